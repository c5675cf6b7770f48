"""Which way a run goes through its prototypes, and what the other way would cost.

Part of the door, beside `startup.py`: reads the configuration, calls what takes plain arguments.
"""

from jax.sharding import Mesh

from dinov2_jax import report, sharding
from dinov2_jax.losses.head_modes import BlockHeads, HeadMode, choose_head_mode


def build_heads(config, mesh: Mesh) -> HeadMode:
    """What `heads` means on the mesh's devices, for this many rows and prototypes."""
    return choose_head_mode(
        config.heads,
        platform=mesh.devices.flat[0].platform,  # which need not be this machine's
        logit_bytes=logit_bytes(config, mesh),
        block_size=config.head_block_size,
    )


def logit_bytes(config, mesh: Mesh) -> int:
    """Estimate of what dense heads keep on one device."""
    ibot = config.ibot if config.ibot.separate_head else config.dino
    patches = (config.crops.global_crop_size_px // config.model.patch_size) ** 2
    masks = config.masks
    masked_share = masks.mask_probability * (masks.mask_ratio_min + masks.mask_ratio_max) / 2
    num_prototypes = (
        config.dino.num_prototypes * (config.dino.loss_weight > 0),
        ibot.num_prototypes * (config.ibot.loss_weight > 0),
    )
    return report.estimate_logit_bytes(
        images=config.global_batch_size // sharding.batch_shards(mesh),
        num_micro_batches=config.grad_accumulation_steps,
        num_local_crops=config.crops.num_local_crops,
        masked_tokens=masked_share * patches,
        num_prototypes=tuple(k // mesh.shape["model"] for k in num_prototypes),
    )


def describe_heads(config, mesh: Mesh) -> tuple[str, int]:
    """The way in words, and the bytes of targets and logits that it keeps on one device."""
    num_bytes = logit_bytes(config, mesh)
    heads = build_heads(config, mesh)
    if isinstance(heads, BlockHeads):
        way = "by kernels" if heads.has_kernels else "in blocks"
        return f"{way}: {report.megabytes(num_bytes)} of targets and logits are never kept", 0
    return f"dense: about {report.megabytes(num_bytes)} of targets and logits a device", num_bytes
