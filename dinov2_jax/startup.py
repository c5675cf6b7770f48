"""Builds everything a run needs from its configuration.

Part of the door: beside `config.py`, `train.py` and the commands, the only file that reads a
configuration; whatever it calls takes plain arguments.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dinov2_jax import sharding
from dinov2_jax.augment import augment
from dinov2_jax.checkpoints import abstract_like
from dinov2_jax.compiler import compiler_options
from dinov2_jax.config_rules import ConfigError, check_groups
from dinov2_jax.models.attention import choose_implementation
from dinov2_jax.models.block import choose_backward_kernels, choose_remat
from dinov2_jax.models.drop_path import choose_form
from dinov2_jax.models.heads import DINOHead
from dinov2_jax.models.layer_norm import choose_layer_norm
from dinov2_jax.models.layers import choose_product_form
from dinov2_jax.models.vit import VARIANTS, VisionTransformer
from dinov2_jax.objective import LossSettings
from dinov2_jax.optim.optimizer import make_optimizer
from dinov2_jax.optim.param_groups import parameter_groups
from dinov2_jax.optim.schedules import Schedules, scaled_learning_rate
from dinov2_jax.startup_heads import build_heads
from dinov2_jax.train_state import Network, Params, TrainState, init_state
from dinov2_jax.train_step import make_train_step


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What the loop needs of the device side.

    Attributes:
      mesh: of the devices in use.
      network: the modules.
      schedules: of the five hyperparameters.
      init: () -> TrainState, on the devices; init_backbone: () -> its teacher's backbone alone.
      abstract_state: its shapes, types and shardings.
      train_step: jitted (state, batch, hyperparameters) -> (state, metrics); donates the state.
    """

    mesh: Mesh
    network: Network
    schedules: Schedules
    init: Callable[[], TrainState]
    init_backbone: Callable[[], Params]
    abstract_state: TrainState
    train_step: Callable


@contextlib.contextmanager
def as_config_error():
    """What a room refuses of the configuration's values, said as one line to the user."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build_mesh(config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of the configuration; axes that are all given may use a part of the devices.

    Args:
      config: of the run.
      devices: those of this machine when None; the compile check passes those of a topology.

    Raises:
      ConfigError: the sizes do not fit the devices or the batch, or a process would have no device
        or another share of the batch than the others.
    """
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.model)
    devices = jax.devices() if devices is None else list(devices)
    if -1 not in sizes:
        unused = {device.process_index for device in devices[math.prod(sizes) :]}
        devices = devices[: math.prod(sizes)]
        if idle := sorted(unused - {device.process_index for device in devices}):
            raise ConfigError(
                f"mesh {'x'.join(map(str, sizes))} leaves processes {idle} without a device; set "
                "mesh.data, mesh.fsdp or mesh.model to -1 to use all, or start fewer processes"
            )
    with as_config_error():
        mesh = sharding.make_mesh(data=sizes[0], fsdp=sizes[1], model=sizes[2], devices=devices)
    # What they tell each other of a step, image by image, is one array of all.
    if len(set((shares := sharding.host_shares(mesh)).values())) > 1:
        raise ConfigError(
            f"mesh {'x'.join(map(str, mesh.devices.shape))} gives the processes unequal shares of "
            f"the batch: of its {sharding.batch_shards(mesh)} pieces they hold "
            f"{', '.join(map(str, shares.values()))}, and each must hold as many; set mesh.data or "
            "mesh.fsdp to -1 to use all devices, mesh.model to a divisor or a multiple of the "
            "devices of a process, and start processes of as many devices each"
        )
    check_groups(
        global_batch_size=config.global_batch_size,
        group_size=config.group_size,
        num_batch_shards=sharding.batch_shards(mesh),
        num_micro_batches=config.grad_accumulation_steps,
    )
    return mesh


def build_trainer(config, mesh: Mesh) -> Trainer:
    """Everything on the device side, nothing computed yet but shapes."""
    device = mesh.devices.flat[0]
    network = build_network(config, device, num_devices=mesh.size)
    crop_size = config.crops.global_crop_size_px
    image_shape = (crop_size, crop_size, config.data.in_channels)
    # Abstract too: a topology's devices, which are only compiled for, cannot make a key.
    key = jax.eval_shape(lambda: jax.random.key(config.seed))
    with as_config_error():
        options = compiler_options(config.compiler_preset, platform=device.platform)
        params = jax.eval_shape(functools.partial(network.init, image_shape=image_shape), key)
    groups = parameter_groups(
        params,
        layerwise_lr_decay=config.optim.layerwise_lr_decay,
        patch_embed_lr_multiplier=config.optim.patch_embed_lr_multiplier,
    )
    optimizer = make_optimizer(
        b1=config.optim.adam_b1,
        b2=config.optim.adam_b2,
        eps=config.optim.adam_eps,
        clip_norm=config.optim.clip_norm,
        lr_multipliers=groups.lr_multiplier,
        wd_multipliers=groups.wd_multiplier,
        is_last_layer=groups.is_last_layer,
    )
    init = functools.partial(
        init_state, network=network, optimizer=optimizer, image_shape=image_shape
    )
    shapes = jax.eval_shape(init, key)
    shardings = sharding.tree_sharding(
        shapes, mesh, min_size_to_shard_mb=config.mesh.min_size_to_shard_mb
    )
    train_step = make_train_step(
        network=network,
        optimizer=optimizer,
        losses=build_losses(config, mesh),
        augment=build_augment(config),
        seed=config.seed,
        num_micro_batches=config.grad_accumulation_steps,
    )
    return Trainer(
        mesh=mesh,
        network=network,
        schedules=build_schedules(config),
        init=lambda: jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed)),
        init_backbone=lambda: jax.jit(
            lambda key: init(key).teacher["backbone"], out_shardings=shardings.teacher["backbone"]
        )(jax.random.key(config.seed)),
        abstract_state=abstract_like(shapes, shardings),
        train_step=jax.jit(
            train_step,
            in_shardings=(shardings, sharding.batch_sharding(mesh), None),
            out_shardings=(shardings, None),
            donate_argnums=0,
            compiler_options=options,
        ),
    )


def compute_dtype(config, *, platform: str) -> jnp.dtype:
    """The type the network computes in, on devices of a platform such as "tpu"."""
    if config.dtype == "auto":
        return jnp.dtype(jnp.float32 if platform == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.dtype)


def build_network(config, device: jax.Device, *, num_devices: int = 1) -> Network:
    """Backbone and heads, for so many devices like this one."""
    model, dtype = config.model, compute_dtype(config, platform=device.platform)
    with as_config_error():
        attention = choose_implementation(config.attention, device, dtype)
        layer_norm = choose_layer_norm(config.layer_norm, device.platform)
        product_form = choose_product_form(config.product_form, device.platform, num_devices)
        drop_path_form = choose_form(config.drop_path_form, device.platform, layer_norm)
    sizes = dict(VARIANTS.get(model.variant, {}))
    sizes |= {name: model[name] for name in ("embed_dim", "depth", "num_heads") if model[name]}
    if sizes["embed_dim"] % sizes["num_heads"]:
        raise ConfigError(
            f"model.embed_dim={sizes['embed_dim']} must be a multiple of "
            f"model.num_heads={sizes['num_heads']}"
        )
    grid = config.crops.global_crop_size_px // model.patch_size
    backward_kernels = choose_backward_kernels(config.mesh.backward_kernels, device.device_kind)
    backbone = VisionTransformer(
        **(sizes | {"ffn": model.ffn}),
        patch_size=model.patch_size,
        mlp_ratio=model.mlp_ratio,
        layer_scale_init=model.layer_scale_init,
        num_register_tokens=model.num_register_tokens,
        pos_embed_grid=(grid, grid),
        interpolation=model.interpolation,
        in_channels=config.data.in_channels,
        drop_path_rate=model.drop_path_rate,
        drop_path_mode=model.drop_path_mode,
        drop_path_form=drop_path_form,
        dtype=dtype,
        remat=choose_remat(config.remat, device.platform),
        keep_kernels=backward_kernels == "keep",
        attention=attention,
        layer_norm=layer_norm,
        product_form=product_form,
        scan_unroll=config.scan_unroll,
    )

    def head(settings) -> DINOHead:
        names = ("num_prototypes", "hidden_dim", "bottleneck_dim", "num_layers")
        return DINOHead(**{name: settings[name] for name in names}, dtype=dtype)

    is_separate = config.ibot.separate_head and config.ibot.loss_weight > 0
    needs_dino = config.dino.loss_weight > 0 or not is_separate
    return Network(
        backbone=backbone,
        dino_head=head(config.dino) if needs_dino else None,
        ibot_head=head(config.ibot) if is_separate else None,
    )


def build_losses(config, mesh: Mesh) -> LossSettings:
    """Weights and constants of the losses, and how the prototypes are gone through."""
    return LossSettings(
        dino_weight=config.dino.loss_weight,
        ibot_weight=config.ibot.loss_weight,
        koleo_weight=config.koleo.loss_weight,
        koleo_crops=config.koleo.koleo_crops,
        centering=config.centering.kind,
        num_sinkhorn_iters=config.centering.num_sinkhorn_iters,
        center_momentum=config.centering.center_momentum,
        student_temp=config.centering.student_temp,
        heads=build_heads(config, mesh),
    )


def build_augment(config) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The device side of the augmentation."""
    return functools.partial(
        augment,
        mean=config.augment.mean,
        std=config.augment.std,
        blur_kernel_size_px=config.augment.blur_kernel_size_px,
        solarize_threshold=config.augment.solarize_threshold,
    )


def learning_rate_rule(config) -> dict:
    """Arguments of `scaled_learning_rate` and of the sentence about it."""
    return {
        "base": config.optim.base_learning_rate,
        "global_batch_size": config.global_batch_size,
        "rule": config.optim.learning_rate_scaling,
    }


def build_schedules(config) -> Schedules:
    """The five schedules."""
    return Schedules(
        total_steps=config.total_steps,
        warmup_steps=config.optim.warmup_steps,
        learning_rate=scaled_learning_rate(**learning_rate_rule(config)),
        min_learning_rate=config.optim.min_learning_rate,
        freeze_last_layer_steps=config.optim.freeze_last_layer_steps,
        weight_decay_start=config.optim.weight_decay_start,
        weight_decay_end=config.optim.weight_decay_end,
        teacher_momentum_start=config.teacher.momentum_start,
        teacher_momentum_end=config.teacher.momentum_end,
        teacher_temp_start=config.centering.teacher_temp_start,
        teacher_temp=config.centering.teacher_temp,
        teacher_temp_warmup_steps=config.centering.teacher_temp_warmup_steps,
    )
