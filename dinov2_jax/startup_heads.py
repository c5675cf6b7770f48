"""The heads' rows, which way a run goes through its prototypes, and what the other would cost.

Part of the door, beside `startup.py`: reads the configuration, calls what takes plain arguments.
"""

import math

import jax
from jax.sharding import Mesh

from dinov2_jax import report, sharding
from dinov2_jax.cost.chips import gpu_memory_bytes
from dinov2_jax.data.masking import BlockMasks
from dinov2_jax.losses import cross_entropy_pallas
from dinov2_jax.losses.blocks import choose_layout
from dinov2_jax.losses.head_modes import BlockHeads, HeadMode, choose_head_mode


def build_masks(config) -> BlockMasks:
    """Masks of one group; none without an iBOT loss."""
    grid = config.crops.global_crop_size_px // config.model.patch_size
    masks = config.masks
    return BlockMasks(
        rows=grid,
        cols=grid,
        num_crops=2 * config.group_size,
        mask_probability=masks.mask_probability if config.ibot.loss_weight else 0.0,
        mask_ratio_min=masks.mask_ratio_min,
        mask_ratio_max=masks.mask_ratio_max,
    )


def build_heads(config, mesh: Mesh) -> HeadMode:
    """What `heads` means on the mesh's devices, for this many rows and prototypes."""
    device = mesh.devices.flat[0]  # which need not be this machine's
    return choose_head_mode(
        config.heads,
        platform=device.platform,
        logit_bytes=logit_bytes(config, mesh),
        # By the name of the board, which is the same on all hosts and in the compile check: what a
        # device says of its memory differs a little, and all must choose alike.
        memory_bytes=gpu_memory_bytes(device.device_kind),
        block_size=config.head_block_size,
    )


def logit_bytes(config, mesh: Mesh) -> int:
    """Estimate of what dense heads keep on one device."""
    ibot, masks = ibot_settings(config), build_masks(config)
    num_prototypes = (
        config.dino.num_prototypes * (config.dino.loss_weight > 0),
        ibot.num_prototypes * (config.ibot.loss_weight > 0),
    )
    return report.estimate_logit_bytes(
        images=config.global_batch_size // sharding.batch_shards(mesh),
        num_micro_batches=config.grad_accumulation_steps,
        num_local_crops=config.crops.num_local_crops,
        masked_rows=masks.max_masked_patches / masks.num_crops,
        num_prototypes=tuple(k // mesh.shape["model"] for k in num_prototypes),
    )


def heads_name(config, mesh: Mesh) -> str:
    """The value of `heads` that a run has: "dense", "blocks" or "pallas"."""
    heads = build_heads(config, mesh)
    if isinstance(heads, BlockHeads):
        return "pallas" if heads.has_kernels else "blocks"
    return "dense"


def ibot_settings(config):
    """Of the head that patches go through."""
    return config.ibot if config.ibot.separate_head else config.dino


def ibot_loss_has_kernels(config, mesh: Mesh) -> bool:
    """Whether the vector memory of the mesh's TPUs has room for the kernels of iBOT's loss.

    Where it has not, the loss goes through blocks, and kernels make its targets alone.
    """
    ibot = ibot_settings(config)
    groups = config.global_batch_size // config.group_size // config.grad_accumulation_steps
    shape, width = (groups, build_masks(config).max_masked_patches), ibot.bottleneck_dim
    with jax.set_mesh(mesh):
        row_axes = choose_layout(shape, ibot.num_prototypes, width=width).row_axes
        num_rows = math.prod(shape) // math.prod(mesh.shape[axis] for axis in row_axes)
        return cross_entropy_pallas.fits(num_rows, width)


def describe_heads(config, mesh: Mesh) -> tuple[str, int]:
    """The way in words, and the bytes of targets and logits that it keeps on one device."""
    num_bytes = logit_bytes(config, mesh)
    heads = build_heads(config, mesh)
    if isinstance(heads, BlockHeads):
        way = "by kernels" if heads.has_kernels else "in blocks"
        if heads.has_kernels and config.ibot.loss_weight:
            way += "" if ibot_loss_has_kernels(config, mesh) else ", but for the losses, in blocks"
        return f"{way}: {report.megabytes(num_bytes)} of targets and logits are never kept", 0
    return f"dense: about {report.megabytes(num_bytes)} of targets and logits a device", num_bytes
