"""Images per second of `model(images)`, beside PyTorch on the same machine.

Random weights of the released sizes, float32, each way on the same threads and images, in turns:

    ours            dinov2_jax, jitted
    reference       the package `dinov2`; without xFormers its softmax is spelled out
    reference+sdpa  the same modules with torch's scaled_dot_product_attention
    transformers    Dinov2Model with its default attention, which is sdpa

    python -m benchmarks.inference --variants vit_small vit_base --sizes 224 518 --batches 1 16
"""

import argparse
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable

import numpy as np

from benchmarks.turns import limit_threads, median_ratios, take_turns, timed


def make_model(variant: str):
    """A record of a released size and random parameters, as numpy."""
    from dinov2_jax.convert import ModelSpec
    from dinov2_jax.convert.state_dict import nest
    from dinov2_jax.models.vit import VARIANTS, VisionTransformer

    module = VisionTransformer(patch_size=14, pos_embed_grid=(37, 37), **VARIANTS[variant])
    spec = ModelSpec.from_module(module, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    rng, params = np.random.default_rng(0), {}
    for path, shape in spec.shapes().items():
        params[path] = 0.03 * rng.standard_normal(shape, np.float32)
        if path.endswith(("scale", "gamma")):
            params[path] += 1
    return spec, nest(params)


def load_ours(spec, params) -> Callable[[np.ndarray], np.ndarray]:
    from dinov2_jax.model import Model

    model = Model(spec, params)

    def run(images):
        output = model(images)
        return np.concatenate([output.cls[:, None], output.patches], axis=1)

    return run


def sdpa_attention() -> type:
    """The reference's attention, its softmax by torch's scaled_dot_product_attention."""
    import torch
    from dinov2.layers import MemEffAttention

    class Fused(MemEffAttention):
        def forward(self, x):
            b, n, d = x.shape
            qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            x = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return self.proj(x.transpose(1, 2).reshape(b, n, d))

    return Fused


def load_reference(spec, params, *, sdpa: bool) -> Callable[[np.ndarray], np.ndarray]:
    import torch
    from dinov2.layers import MemEffAttention
    from dinov2.models.vision_transformer import Block, DinoVisionTransformer

    from dinov2_jax.convert.state_dict import to_reference

    attention = sdpa_attention() if sdpa else MemEffAttention
    module = DinoVisionTransformer(
        img_size=518,
        patch_size=spec.patch_size,
        embed_dim=spec.embed_dim,
        depth=spec.depth,
        num_heads=spec.num_heads,
        ffn_layer=spec.ffn,
        init_values=1.0,
        block_chunks=0,
        block_fn=functools.partial(Block, attn_class=attention),
    ).eval()
    weights = to_reference(params)
    module.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in weights.items()})

    def run(images):
        with torch.inference_mode():
            # NHWC memory seen as NCHW: the patch embedding takes either.
            output = module.forward_features(torch.from_numpy(images).permute(0, 3, 1, 2))
        cls, patches = output["x_norm_clstoken"], output["x_norm_patchtokens"]
        return torch.cat([cls[:, None], patches], dim=1).numpy()

    return run


def load_transformers(spec, params) -> Callable[[np.ndarray], np.ndarray]:
    import torch
    import transformers

    from dinov2_jax.convert import write_model

    with tempfile.TemporaryDirectory() as folder:
        write_model(f"{folder}/hf", spec, params, format="hf")
        module = transformers.Dinov2Model.from_pretrained(f"{folder}/hf").eval()
    assert module.config._attn_implementation == "sdpa"

    def run(images):
        with torch.inference_mode():
            return module(torch.from_numpy(images).permute(0, 3, 1, 2)).last_hidden_state.numpy()

    return run


def report(title: str, seconds: dict[str, np.ndarray], batch: int) -> None:
    """Medians of the rates, and of the ratios inside a turn, which other work disturbs less."""
    for name, rows in seconds.items():
        wall, cpu = np.median(rows, axis=0)
        wall_ratio, cpu_ratio = median_ratios(seconds, name)
        print(
            f"{title} {name:14} {batch / wall:7.2f} images/s, {cpu / batch:7.3f} CPU s/image; "
            f"ours is {wall_ratio:.2f} times as fast, {cpu_ratio:.2f} by CPU time",
            flush=True,
        )


def agreement(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference over the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--variants", nargs="+", default=["vit_small", "vit_base"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 518], help="px")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    # Before either library looks: XLA makes as many threads as it may use cores.
    limit_threads(options.threads)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import torch

    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads; {options.rounds} turns after a warm-up; float32")
    for variant in options.variants:
        spec, params = make_model(variant)
        ways = {
            "ours": load_ours(spec, params),
            "reference": load_reference(spec, params, sdpa=False),
            "reference+sdpa": load_reference(spec, params, sdpa=True),
            "transformers": load_transformers(spec, params),
        }
        # transformers resizes positions by its own rule, which ours follows here.
        as_transformers = load_ours(dataclasses.replace(spec, interpolation="plain"), params)
        for size in options.sizes:
            images = np.random.default_rng(1).standard_normal((1, size, size, 3), np.float32)
            ours = {"transformers": as_transformers(images)}
            for name, run in list(ways.items())[1:]:
                error = agreement(ours.get(name, ways["ours"](images)), run(images))
                print(f"{variant} {size} px: ours and {name} differ by {error:.1e} of the largest")
            for batch in options.batches:
                images = np.random.default_rng(1).standard_normal(
                    (batch, size, size, 3), np.float32
                )
                title = f"{variant} {size} px, batch {batch}:"
                contenders = {
                    name: functools.partial(timed, functools.partial(run, images))
                    for name, run in ways.items()
                }
                report(title, take_turns(contenders, options.rounds), batch)


if __name__ == "__main__":
    main()
