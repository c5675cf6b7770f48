"""What a configuration's step gets and how much it computes, without data or devices.

Part of the door, like `startup.py`: it reads the configuration.
"""

import dataclasses

import jax
from jax.sharding import Mesh

from dinov2_jax.cost.flops import BackboneSizes, HeadSizes, step_flops
from dinov2_jax.data.batch import batch_layout
from dinov2_jax.models.drop_path import num_kept
from dinov2_jax.models.heads import DINOHead
from dinov2_jax.models.layers import ffn_hidden_dim
from dinov2_jax.sharding import DEVICE_FIELDS, batch_sharding
from dinov2_jax.speed import Speed
from dinov2_jax.startup import Trainer
from dinov2_jax.startup_heads import build_masks
from dinov2_jax.train_state import Network


@dataclasses.dataclass(frozen=True)
class Flops:
    """Of one step over all devices; see `cost.flops.step_flops`.

    Attributes:
      model: as if drop path skipped nothing.
      executed: of the images that it keeps; padding rows of the masked patches count.
    """

    model: float
    executed: float


def abstract_batch(config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The step's batch as shapes, types and shardings."""
    crops, masks = config.crops, build_masks(config)
    layout = batch_layout(
        images=config.global_batch_size,
        groups=config.global_batch_size // config.group_size,
        global_crop_size_px=crops.global_crop_size_px,
        local_crop_size_px=crops.local_crop_size_px,
        num_local_crops=crops.num_local_crops,
        num_channels=config.data.in_channels,
        crops_per_group=masks.num_crops,
        patches=masks.rows * masks.cols,
        max_masked_patches=masks.max_masked_patches,
    )
    sharding = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(*layout[name], sharding=sharding) for name in DEVICE_FIELDS}


def count_flops(config, network: Network) -> Flops:
    """The floating-point operations of a step."""
    backbone, model, crops = network.backbone, config.model, config.crops
    sizes = {
        "backbone": BackboneSizes(
            embed_dim=backbone.embed_dim,
            depth=backbone.depth,
            ffn_dim=ffn_hidden_dim(backbone.embed_dim, model.mlp_ratio, model.ffn),
            num_ffn_products={"mlp": 2, "swiglu": 3}[model.ffn],
            patch_size=model.patch_size,
            in_channels=config.data.in_channels,
            num_extra_tokens=1 + model.num_register_tokens,
        ),
        "images": config.global_batch_size,
        "global_crop_size_px": crops.global_crop_size_px,
        "local_crop_size_px": crops.local_crop_size_px,
        "num_local_crops": crops.num_local_crops,
    }
    if config.dino.loss_weight:
        sizes["dino_head"] = _head_sizes(network.dino_head, backbone.embed_dim)
    if config.ibot.loss_weight:
        patch_head = getattr(network, network.patch_head_name)
        sizes["ibot_head"] = _head_sizes(patch_head, backbone.embed_dim)
        groups = config.global_batch_size // config.group_size
        sizes["ibot_rows"] = groups * build_masks(config).max_masked_patches

    def kept(crops_per_image: int) -> float:
        rows = config.group_size * crops_per_image
        is_skipping = model.drop_path_mode == "subset" and rows
        return num_kept(rows, model.drop_path_rate) / rows if is_skipping else 1.0

    return Flops(
        model=step_flops(**sizes),
        executed=step_flops(**sizes, kept_global=kept(2), kept_local=kept(crops.num_local_crops)),
    )


def measure(config, trainer: Trainer) -> Speed:
    """What is known of a step's speed before it is timed."""
    flops = count_flops(config, trainer.network)
    return Speed(
        images=config.global_batch_size,
        model_flops=flops.model,
        executed_flops=flops.executed,
        devices=list(trainer.mesh.devices.flat),
    )


def _head_sizes(head: DINOHead, in_dim: int) -> HeadSizes:
    return HeadSizes(
        in_dim=in_dim,
        hidden_dim=head.hidden_dim,
        bottleneck_dim=head.bottleneck_dim,
        num_layers=head.num_layers,
        num_prototypes=head.num_prototypes,
    )
