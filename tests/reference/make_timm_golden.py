"""Makes golden/timm_tiny.npz: tiny timm models, and their tokens on random images.

Made once, with timm 1.0.31 on torch 2.14.1 and torchvision 0.29.1, on a CPU:
`python make_timm_golden.py golden/timm_tiny.npz` in an environment that has them.
"""

import sys

import numpy as np

SIZES = ((49, 49), (28, 28), (42, 70), (91, 91))


def main(path: str) -> None:
    import timm
    import torch

    models = {
        "plain": dict(mlp_ratio=4.0),
        "reg4": dict(mlp_ratio=4.0, reg_tokens=4, no_embed_class=True),
        "swiglu": dict(mlp_ratio=6.0, mlp_layer=timm.layers.SwiGLUPacked, act_layer=torch.nn.SiLU),
    }
    arrays = {}
    for name, settings in models.items():
        torch.manual_seed(0)
        model = timm.models.vision_transformer.VisionTransformer(
            img_size=49,
            patch_size=7,
            embed_dim=16,
            depth=2,
            num_heads=2,
            init_values=1.0,
            num_classes=0,
            dynamic_img_size=True,
            **settings,
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
            for height, width in SIZES:
                rng = np.random.default_rng(height * 1000 + width)
                images = rng.standard_normal((1, 3, height, width)).astype(np.float32)
                tokens = model.forward_features(torch.tensor(images))
                arrays[f"{name}/{height}x{width}/tokens"] = tokens.numpy()
        for key, value in model.state_dict().items():
            arrays[f"{name}/param/{key}"] = value.numpy()
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
