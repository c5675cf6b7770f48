"""What a run says of what it built: the start-up table, and what "auto" became.

Part of the door, beside `startup.py`: reads the configuration, calls what takes plain arguments.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dinov2_jax import report
from dinov2_jax.compiler import choose_preset
from dinov2_jax.models.attention import computed_by
from dinov2_jax.models.vit import VisionTransformer
from dinov2_jax.optim.schedules import describe_learning_rate
from dinov2_jax.sharding import batch_shards, path_names
from dinov2_jax.startup import Trainer, learning_rate_rule
from dinov2_jax.startup_heads import describe_heads, heads_name


def crop_tokens(config) -> tuple[int, int]:
    """Tokens of a global and of a local crop."""
    sizes = (config.crops.global_crop_size_px, config.crops.local_crop_size_px)
    extra = 1 + config.model.num_register_tokens
    return tuple((size // config.model.patch_size) ** 2 + extra for size in sizes)


def describe_attention(config, backbone: VisionTransformer, mesh: Mesh) -> str:
    """Who computes it: "pallas", or "xla at 1370 tokens, pallas at 50" if crops differ."""
    tokens = crop_tokens(config)[: 2 if config.crops.num_local_crops else 1]
    with jax.set_mesh(mesh):  # of whose devices the kernels must fit the memory
        names = [
            computed_by(
                backbone.attention, n, backbone.embed_dim, backbone.num_heads, backbone.dtype
            )
            for n in tokens
        ]
    if len(set(names)) == 1:
        return names[0]
    (first, second), (n, m) = names, tokens
    return f"{first} at {n} tokens, {second} at {m}"


def describe_choices(config, trainer: Trainer) -> str:
    """What "auto" became, key by key; nothing of what was given."""
    mesh, backbone = trainer.mesh, trainer.network.backbone
    platform = mesh.devices.flat[0].platform
    drops_paths = backbone.drop_path_rate > 0 and backbone.drop_path_mode == "subset"
    preset = choose_preset(config.compiler_preset, platform=platform)
    values = {
        "attention": describe_attention(config, backbone, mesh),
        "layer_norm": backbone.layer_norm,
        "product_form": backbone.product_form,
        "drop_path_form": backbone.drop_path_form if drops_paths else None,
        "remat": backbone.remat,
        "heads": heads_name(config, mesh),
        "compiler_preset": preset or "none",
        "mesh.backward_kernels": backward_kernels(config, trainer),
    }
    given = {key: (config.mesh if "." in key else config)[key.split(".")[-1]] for key in values}
    return ", ".join(
        f"{key} {value}" for key, value in values.items() if value and given[key] == "auto"
    )


def backward_kernels(config, trainer: Trainer) -> str | None:
    """What becomes of the kernels that `fsdp` cuts: "keep" or "gather"; None if it makes no odds.

    That is, if it cuts none, or if there is but one size of crops.
    """
    if trainer.mesh.shape["fsdp"] == 1 or not config.crops.num_local_crops:
        return None
    return "keep" if trainer.network.backbone.keep_kernels else "gather"


def kept_kernel_bytes(config, trainer: Trainer) -> int:
    """Of the student's blocks, whole on each device from the forward to the backward pass."""
    if backward_kernels(config, trainer) != "keep":
        return 0
    leaves = jax.tree_util.tree_leaves_with_path(trainer.abstract_state.student)
    sizes = [
        leaf.size
        for names, leaf in ((path_names(path), leaf) for path, leaf in leaves)
        if "blocks" in names and names[-1] == "kernel"
    ]
    return sum(sizes) * jnp.dtype(trainer.network.backbone.dtype).itemsize


def describe(config, trainer: Trainer, *, config_path: str, workdir, num_images: int) -> str:
    """The start-up table."""
    backbone = trainer.network.backbone
    shards = batch_shards(trainer.mesh)
    global_tokens, local_tokens = crop_tokens(config)
    activation_bytes = report.estimate_activation_bytes(
        images=config.global_batch_size // shards // config.grad_accumulation_steps,
        global_tokens=global_tokens,
        local_tokens=local_tokens,
        num_local_crops=config.crops.num_local_crops,
        embed_dim=backbone.embed_dim,
        depth=backbone.depth,
        num_heads=backbone.num_heads,
        mlp_ratio=config.model.mlp_ratio,
        itemsize=jnp.dtype(backbone.dtype).itemsize,
        kept_share=1 - config.model.drop_path_rate * (config.model.drop_path_mode == "subset"),
        remat=backbone.remat,
    )
    heads, logit_bytes = describe_heads(config, trainer.mesh)
    return report.start_table(
        config_path=config_path,
        workdir=workdir,
        mesh=trainer.mesh,
        state=trainer.abstract_state,
        dtype=str(jnp.dtype(backbone.dtype)),
        chosen=describe_choices(config, trainer),
        heads=heads,
        global_batch_size=config.global_batch_size,
        group_size=config.group_size,
        learning_rate=describe_learning_rate(**learning_rate_rule(config)),
        activation_bytes=activation_bytes + logit_bytes + kept_kernel_bytes(config, trainer),
        epochs=config.total_steps * config.global_batch_size / num_images,
        total_steps=config.total_steps,
    )
