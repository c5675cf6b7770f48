"""What can be said of a run before its first step: the start-up table, warnings, proposals.

Part of the door, like `startup.py`: it reads the configuration.
"""

import argparse

from etils import epath

from dinov2_jax import inputs, report, startup, startup_table
from dinov2_jax.advice.cautions import warnings_of
from dinov2_jax.advice.proposals import suggest
from dinov2_jax.advice.settings import RunSettings
from dinov2_jax.distributed import is_primary
from dinov2_jax.sharding import batch_shards


def show(config, flags: argparse.Namespace, workdir: epath.Path) -> None:
    """Prints, on the first process, what `--dry_run` or `--suggest` asks for; writes nothing."""
    source = inputs.open_data(config)
    trainer = startup.build_trainer(config, startup.build_mesh(config))
    num_images = len(source)
    found = [source.describe()]
    if flags.dry_run:
        found.append(
            startup_table.describe(
                config, trainer, config_path=flags.config, workdir=workdir, num_images=num_images
            )
        )
    found += warnings(config, trainer, num_images=num_images, has_hint=not flags.suggest)
    if flags.suggest:
        run = run_settings(config, trainer, num_images=num_images)
        found.append(report.suggestion_table(suggest(run)))
    if is_primary():
        print("\n".join(found))


def warnings(
    config, trainer: startup.Trainer, *, num_images: int, has_hint: bool = True
) -> list[str]:
    """Lines that every start prints: what cannot work or almost surely does not, and where next."""
    run = run_settings(config, trainer, num_images=num_images)
    found = [f"warning: {line}" for line in warnings_of(run)]
    if has_hint and found and any(item.is_change for item in suggest(run)):
        found.append("the same command with --suggest prints values that fit, with reasons")
    return found


def run_settings(config, trainer: startup.Trainer, *, num_images: int) -> RunSettings:
    """What the advice depends on."""
    return RunSettings(
        num_images=num_images,
        global_batch_size=config.global_batch_size,
        total_steps=config.total_steps,
        group_size=config.group_size,
        num_batch_pieces=batch_shards(trainer.mesh) * config.grad_accumulation_steps,
        embed_dim=trainer.network.backbone.embed_dim,
        layer_scale_init=config.model.layer_scale_init,
        patch_size=config.model.patch_size,
        global_crop_size_px=config.crops.global_crop_size_px,
        local_crop_size_px=config.crops.local_crop_size_px,
        num_local_crops=config.crops.num_local_crops,
        mask_probability=config.masks.mask_probability,
        mask_ratio_min=config.masks.mask_ratio_min,
        mask_ratio_max=config.masks.mask_ratio_max,
        dino_weight=config.dino.loss_weight,
        ibot_weight=config.ibot.loss_weight,
        koleo_weight=config.koleo.loss_weight,
        has_separate_head=config.ibot.separate_head,
        dino_prototypes=config.dino.num_prototypes,
        ibot_prototypes=config.ibot.num_prototypes,
        centering=config.centering.kind,
        center_momentum=config.centering.center_momentum,
        teacher_temp_start=config.centering.teacher_temp_start,
        teacher_temp=config.centering.teacher_temp,
        teacher_temp_warmup_steps=config.centering.teacher_temp_warmup_steps,
        momentum_start=config.teacher.momentum_start,
        momentum_end=config.teacher.momentum_end,
        base_learning_rate=config.optim.base_learning_rate,
        min_learning_rate=config.optim.min_learning_rate,
        learning_rate_scaling=config.optim.learning_rate_scaling,
        layerwise_lr_decay=config.optim.layerwise_lr_decay,
        warmup_steps=config.optim.warmup_steps,
        freeze_last_layer_steps=config.optim.freeze_last_layer_steps,
    )
