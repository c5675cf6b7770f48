"""One training step of ours and of the reference's modules, on the same weights, crops and masks.

Ours comes first: it writes what it starts from to a folder, which the others read. Ours gets bytes
and augments them on the device, with parameters that change nothing; the reference's loader does
that before its step, which is given floats.
"""

import functools
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping

import numpy as np

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
Terms = dict[str, float]


def load(config_name: str, overrides: Mapping):
    """A configuration of `configs/`; overrides are values by dotted key."""
    from dinov2_jax.config import load_config

    texts = [(key, str(value)) for key, value in overrides.items()]
    return load_config(str(CONFIGS / f"{config_name}.py"), texts, needs_data=False)


def make_batch(config) -> dict[str, np.ndarray]:
    """Random crops, tinted so that a network can tell them apart, and masks as a run draws them."""
    from dinov2_jax.data.batch import AUGMENT_COLUMNS
    from dinov2_jax.startup_heads import build_masks

    rng, crops, batch = np.random.default_rng(0), config.crops, {}
    views = {
        "global": (2, crops.global_crop_size_px),
        "local": (crops.num_local_crops, crops.local_crop_size_px),
    }
    for name, (count, px) in views.items():
        shape = (config.global_batch_size, count, px, px, config.data.in_channels)
        tint = rng.integers(-90, 90, (*shape[:2], 1, 1, shape[-1]))
        pixels = np.clip(rng.integers(60, 196, shape) + tint, 0, 255)
        batch[f"{name}_crops"] = pixels.astype(np.uint8)
        batch[f"{name}_augment"] = np.zeros((*shape[:2], len(AUGMENT_COLUMNS)), np.float32)
    num_groups = config.global_batch_size // config.group_size
    draws = [build_masks(config)(rng) for _ in range(num_groups)]
    names = ("masks", "mask_indices", "mask_weights")
    return batch | {
        name: np.stack(x) for name, x in zip(names, zip(*draws, strict=True), strict=True)
    }


def start_ours(config_name: str, overrides: Mapping, folder: str) -> Callable[[], Terms]:
    """The step that `dinov2_jax.train` runs, with what its configuration chooses by itself."""
    return build_ours(config_name, overrides, folder)[1]


def build_ours(config_name: str, overrides: Mapping, folder: str) -> tuple:
    """The compiled program of `start_ours`, and its step."""
    import jax

    from dinov2_jax import startup
    from dinov2_jax.convert.state_dict import to_reference
    from dinov2_jax.sharding import batch_sharding

    config = load(config_name, overrides)
    mesh = startup.build_mesh(config)
    trainer = startup.build_trainer(config, mesh)
    # Of the middle of the run: nothing is frozen or warming up.
    hyper = trainer.schedules.at(config.total_steps // 2)
    batch, state = make_batch(config), trainer.init()
    np.savez(f"{folder}/start.npz", **to_reference(jax.tree.map(np.asarray, state.student)))
    np.savez(f"{folder}/batch.npz", **batch)
    backbone = trainer.network.backbone
    facts = {
        "sizes": {name: getattr(backbone, name) for name in ("embed_dim", "depth", "num_heads")},
        "hyper": [float(x) for x in hyper],
    }
    pathlib.Path(folder, "facts.json").write_text(json.dumps(facts))
    with jax.set_mesh(mesh):
        batch = jax.device_put(batch, batch_sharding(mesh))
        train_step = trainer.train_step.lower(state, batch, hyper).compile()

    def step() -> Terms:
        nonlocal state
        state, metrics = train_step(state, batch, hyper)
        return {name: float(value) for name, value in metrics.items()}

    return train_step, step


def start_reference(
    config_name: str, overrides: Mapping, folder: str, is_fused: bool
) -> Callable[[], Terms]:
    """The package's modules in the order of its step (`tests.reference.torch_step`), one group.

    `is_fused`: with scaled_dot_product_attention, in place of the softmax spelled out that the
    package takes without xFormers.
    """
    import torch
    from dinov2.models.vision_transformer import Block

    from benchmarks.inference import sdpa_attention
    from tests.reference.torch_step import TorchStep

    warnings.filterwarnings("ignore", category=FutureWarning)  # inside the reference
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    config = load(config_name, overrides)
    facts = json.loads(pathlib.Path(folder, "facts.json").read_text())
    backbone = facts["sizes"] | dict(
        img_size=config.crops.global_crop_size_px,
        patch_size=config.model.patch_size,
        init_values=config.model.layer_scale_init,
        drop_path_rate=config.model.drop_path_rate,
        drop_path_uniform=True,
        block_chunks=0,
    )
    if is_fused:
        backbone["block_fn"] = functools.partial(Block, attn_class=sdpa_attention())
    heads = [
        dict(
            in_dim=backbone["embed_dim"],
            out_dim=head.num_prototypes,
            hidden_dim=head.hidden_dim,
            bottleneck_dim=head.bottleneck_dim,
        )
        for head in (config.dino, config.ibot)
    ]
    reference = TorchStep(
        backbone=backbone,
        dino_head=heads[0],
        ibot_head=heads[1],
        centering=config.centering.kind,
        num_local_crops=config.crops.num_local_crops,
        koleo_weight=config.koleo.loss_weight,
        clip_norm=config.optim.clip_norm,
        layerwise_decay=config.optim.layerwise_lr_decay,
        patch_embed_lr_mult=config.optim.patch_embed_lr_multiplier,
    )
    reference.teacher.eval()  # only the student drops paths
    with np.load(f"{folder}/start.npz") as start:
        reference.load({name: torch.tensor(start[name]) for name in start})
    with np.load(f"{folder}/batch.npz") as batch:
        rank = one_rank(dict(batch), mean=config.augment.mean, std=config.augment.std)
    names = ("lr", "last_layer_lr", "wd", "momentum", "teacher_temp")
    hyper = dict(zip(names, facts["hyper"], strict=True))
    return lambda: reference.step([rank], **hyper)


def one_rank(batch: dict[str, np.ndarray], *, mean, std) -> dict:
    """A batch of one group as `TorchStep` wants it: crop-major, channels first, normalised."""
    import torch
    from einops import rearrange

    rank = {}
    for name in ("global_crops", "local_crops"):
        crops = torch.from_numpy(rearrange(batch[name], "q v h w c -> (v q) h w c"))
        crops = (crops / 255 - torch.tensor(mean)) / torch.tensor(std)
        rank[name] = crops.permute(0, 3, 1, 2).contiguous()
    (masks,) = batch["masks"]
    return rank | {
        "masks": torch.from_numpy(masks),
        "mask_indices": torch.from_numpy(np.flatnonzero(masks)),
        "mask_weights": torch.from_numpy(batch["mask_weights"][0, : masks.sum()]),
    }
