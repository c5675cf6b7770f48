"""What configuration values must satisfy, one by one and together.

Each rule names the value, the rule and the cure in one line. Nothing here needs jax or the data:
what depends on the devices is `check_groups`, called once the mesh is known.
"""

import re

CHOICES = {
    "augment.mode": ("as_released", "as_intended"),
    "model.variant": ("vit_small", "vit_base", "vit_large", "vit_giant2", "custom"),
    "model.ffn": ("mlp", "swiglu"),
    "model.drop_path_mode": ("subset", "bernoulli"),
    "model.interpolation": ("offset", "plain", "antialias"),
    "koleo.koleo_crops": ("both", "first"),
    "centering.kind": ("sinkhorn_knopp", "softmax_center"),
    "optim.learning_rate_scaling": ("sqrt_1024", "none"),
    "dtype": ("auto", "bfloat16", "float32"),
    "remat": ("auto", "none", "dots", "branches", "blocks"),
    "mesh.backward_kernels": ("auto", "gather", "keep"),
    "attention": ("auto", "xla", "by_head", "pallas", "cudnn"),
    "layer_norm": ("auto", "xla", "products", "pallas"),
    "product_form": ("auto", "plain", "flat", "transposed"),
    "drop_path_form": ("auto", "gather", "matmul", "pallas"),
    "compiler_preset": ("auto", "", "cpu_products", "tpu_overlap", "gpu_overlap"),
    "heads": ("auto", "dense", "blocks", "pallas"),
    "eval.kind": ("none", "knn", "crop_identity"),
    "data.in_channels": (1, 3, 4),
}
# Smallest value of each number that has one; probabilities and fractions are below.
AT_LEAST = {
    1: (
        "total_steps global_batch_size group_size data.max_image_pixels crops.global_crop_size_px "
        "crops.local_crop_size_px model.patch_size dino.num_prototypes dino.bottleneck_dim "
        "dino.hidden_dim dino.num_layers ibot.num_prototypes ibot.bottleneck_dim ibot.hidden_dim "
        "ibot.num_layers augment.blur_kernel_size_px centering.num_sinkhorn_iters "
        "grad_accumulation_steps scan_unroll loader.num_threads loader.prefetch_batches "
        "log_every_steps checkpoints.keep_last eval.num_neighbors eval.crop_size_px "
        "eval.resize_size_px eval.batch_size eval.max_images eval.crops_per_image"
    ),
    0: (
        "seed crops.num_local_crops model.embed_dim model.depth model.num_heads "
        "model.num_register_tokens model.mlp_ratio model.layer_scale_init dino.loss_weight "
        "ibot.loss_weight koleo.loss_weight centering.teacher_temp_warmup_steps "
        "optim.base_learning_rate optim.min_learning_rate optim.warmup_steps "
        "optim.weight_decay_start optim.weight_decay_end optim.clip_norm "
        "optim.patch_embed_lr_multiplier optim.freeze_last_layer_steps loader.num_workers "
        "mesh.min_size_to_shard_mb checkpoint_every_steps eval_every_steps teacher_every_steps "
        "checkpoints.keep_every_steps head_block_size guards.max_nonfinite_steps "
        "augment.brightness augment.contrast augment.saturation augment.solarize_threshold"
    ),
}
POSITIVE = (
    "centering.student_temp centering.teacher_temp_start centering.teacher_temp eval.temperature "
    "optim.adam_eps optim.layerwise_lr_decay"
)
FRACTIONS = (
    "data.max_bad_fraction augment.flip_probability augment.jitter_probability "
    "augment.grayscale_probability masks.mask_probability masks.mask_ratio_min "
    "masks.mask_ratio_max centering.center_momentum teacher.momentum_start teacher.momentum_end "
    "model.drop_path_rate optim.adam_b1 optim.adam_b2"
)
RANGES = ("crops.global_crop_scale", "crops.local_crop_scale", "crops.aspect_ratio")


class ConfigError(ValueError):
    """A configuration that cannot run; its text is one line for the user."""


def check_config(config, *, needs_data: bool = True) -> None:
    """Checks a whole, correctly typed configuration; `needs_data`: also that it has images.

    Raises:
      ConfigError: names the value, the rule and the cure.
    """
    _check_each(config)
    _check_data(config, needs_data=needs_data)
    _check_model(config)
    _check_schedules(config)
    _check_batch(config)
    _check_eval(config)


def check_groups(
    *, global_batch_size: int, group_size: int, num_batch_shards: int, num_micro_batches: int = 1
) -> None:
    """Checks that every batch shard (device on the axes data and fsdp) gets whole groups.

    With gradient accumulation, of every micro-batch.

    Raises:
      ConfigError: with the nearest values that fit.
    """
    num_groups = global_batch_size // group_size
    num_pieces = num_batch_shards * num_micro_batches
    if num_groups % num_pieces == 0:
        return
    fits = []
    if global_batch_size % num_pieces == 0:
        share = global_batch_size // num_pieces
        best = max(size for size in range(1, min(share, group_size) + 1) if share % size == 0)
        fits.append(f"group_size={best}")
    unit = group_size * num_pieces
    below = global_batch_size // unit * unit
    batches = [size for size in (below, below + unit) if size > 0]
    fits.append("global_batch_size=" + " or ".join(str(size) for size in batches))
    raise ConfigError(
        f"global_batch_size={global_batch_size} in groups of group_size={group_size} makes "
        f"{num_groups} groups, which must be a multiple of the {num_batch_shards} batch shards "
        f"(mesh.data x mesh.fsdp)"
        + (f" times grad_accumulation_steps={num_micro_batches}" if num_micro_batches > 1 else "")
        + f"; nearest that fit: {', or '.join(fits)}"
    )


def _value(config, key: str):
    for part in key.split("."):
        config = config[part]
    return config


def _check_each(config) -> None:
    for key, choices in CHOICES.items():
        if _value(config, key) not in choices:
            listed = ", ".join("''" if choice == "" else str(choice) for choice in choices)
            raise ConfigError(f"{key}={_value(config, key)!r} must be one of: {listed}")
    for least, keys in AT_LEAST.items():
        for key in keys.split():
            if _value(config, key) < least:
                raise ConfigError(f"{key}={_value(config, key)} must be at least {least}")
    for key in POSITIVE.split():
        if _value(config, key) <= 0:
            raise ConfigError(f"{key}={_value(config, key)} must be above 0")
    for key in FRACTIONS.split():
        if not 0 <= _value(config, key) <= 1:
            raise ConfigError(f"{key}={_value(config, key)} must lie in 0..1")
    for key in RANGES:
        pair = _value(config, key)
        if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
            raise ConfigError(f"{key}={pair} must be (low, high) with 0 < low <= high")
    profile = re.fullmatch(r"(\d+):(\d+)", config.profile_steps)
    in_run = profile and int(profile[1]) < min(int(profile[2]), config.total_steps)
    if config.profile_steps and not in_run:
        raise ConfigError(
            f"profile_steps={config.profile_steps!r} must be first:last with first < last, like "
            f"10:13, and begin before the end, total_steps={config.total_steps}"
        )
    for key in ("optim.adam_b1", "optim.adam_b2"):
        if _value(config, key) == 1:
            raise ConfigError(f"{key}=1.0 must be below 1: its average would never move")
    for key, most in (("seed", 2**31 - 1), ("total_steps", 10**9)):
        if _value(config, key) > most:
            raise ConfigError(f"{key}={_value(config, key)} must be at most {most}")


def _check_data(config, *, needs_data: bool) -> None:
    data, augment = config.data, config.augment
    if needs_data and bool(data.path) == bool(data.mixture):
        found, cure = (
            ("both are set", "empty one, as --config.data.path=")
            if data.path
            else ("neither is set", "use --config.data.path=/your/images")
        )
        raise ConfigError(
            f"data.path or data.mixture must say where the images are, and {found}; {cure}"
        )
    for part in data.mixture:
        pair = part if isinstance(part, tuple | list) and len(part) == 2 else (None, None)
        is_number = isinstance(pair[1], int | float) and not isinstance(pair[1], bool)
        if not (isinstance(pair[0], str) and is_number and pair[1] > 0):
            raise ConfigError(
                f"data.mixture has {part!r}; each part must be (path, weight above 0)"
            )
    if config.crops.global_crop_scale[1] > 1 or config.crops.local_crop_scale[1] > 1:
        raise ConfigError("crops.*_crop_scale are shares of the image's area: at most 1")
    for key in ("mean", "std"):
        if len(augment[key]) != data.in_channels:
            raise ConfigError(
                f"augment.{key}={augment[key]} must have one number per channel: "
                f"data.in_channels={data.in_channels}"
            )
    if min(augment.std) <= 0:
        raise ConfigError(f"augment.std={augment.std} must be above 0")
    if not 0 <= augment.hue <= 0.5:
        raise ConfigError(f"augment.hue={augment.hue} must lie in 0..0.5 turns")
    kernel, crops = augment.blur_kernel_size_px, config.crops
    smallest = crops.global_crop_size_px
    if crops.num_local_crops:
        smallest = min(smallest, crops.local_crop_size_px)
    if kernel % 2 == 0 or kernel > 2 * smallest - 1:
        raise ConfigError(
            f"augment.blur_kernel_size_px={kernel} must be odd, and at most {2 * smallest - 1} for "
            f"crops of {smallest} px"
        )
    sigma = augment.blur_sigma_px
    if len(sigma) != 2 or not 0 < sigma[0] <= sigma[1]:
        raise ConfigError(f"augment.blur_sigma_px={sigma} must be (low, high) with 0 < low <= high")
    for key, lengths in (("blur_probability", (0, 3)), ("solarize_probability", (3,))):
        triple = augment[key]
        is_numbers = all(type(item) in (int, float) for item in triple)
        if len(triple) not in lengths or not is_numbers or any(not 0 <= p <= 1 for p in triple):
            raise ConfigError(
                f"augment.{key}={triple} must be probabilities of (global 1, global 2, local)"
            )


def _check_model(config) -> None:
    model, patch = config.model, config.model.patch_size
    sizes = {"crops.global_crop_size_px": config.crops.global_crop_size_px}
    if config.crops.num_local_crops:
        sizes["crops.local_crop_size_px"] = config.crops.local_crop_size_px
    if config.eval.kind != "none":
        sizes["eval.crop_size_px"] = config.eval.crop_size_px
    for key, size in sizes.items():
        if size % patch:
            near = [fit for fit in (size // patch * patch, -(-size // patch) * patch) if fit]
            raise ConfigError(
                f"{key}={size} must be a multiple of model.patch_size={patch}; "
                f"use {' or '.join(str(fit) for fit in near)}"
            )
    if model.variant == "custom":
        for key in ("embed_dim", "depth", "num_heads"):
            if not model[key]:
                raise ConfigError(f"model.{key}=0 must be set for model.variant='custom'")
    if model.embed_dim and model.num_heads and model.embed_dim % model.num_heads:
        raise ConfigError(
            f"model.embed_dim={model.embed_dim} must be a multiple of "
            f"model.num_heads={model.num_heads}"
        )
    if model.drop_path_rate == 1:
        raise ConfigError("model.drop_path_rate=1.0 must be below 1: it would drop every branch")
    if not config.dino.loss_weight and not config.ibot.loss_weight:
        raise ConfigError("dino.loss_weight and ibot.loss_weight must not both be 0")
    masks = config.masks
    patches = (config.crops.global_crop_size_px // patch) ** 2
    num_masked = int(2 * config.group_size * masks.mask_probability)
    if config.ibot.loss_weight and (num_masked < 1 or masks.mask_ratio_max * patches < 1):
        raise ConfigError(
            f"masks.mask_probability={masks.mask_probability} and masks.mask_ratio_max="
            f"{masks.mask_ratio_max} mask no patch of a group of {config.group_size} images with "
            f"{patches} patches a crop, and iBOT needs one; raise them, or set ibot.loss_weight=0"
        )
    if config.masks.mask_ratio_min > config.masks.mask_ratio_max:
        raise ConfigError(
            f"masks.mask_ratio_min={config.masks.mask_ratio_min} must be at most "
            f"masks.mask_ratio_max={config.masks.mask_ratio_max}"
        )


def _check_schedules(config) -> None:
    for key in (
        "optim.warmup_steps",
        "optim.freeze_last_layer_steps",
        "centering.teacher_temp_warmup_steps",
    ):
        if _value(config, key) > config.total_steps:
            raise ConfigError(
                f"{key}={_value(config, key)} must be at most total_steps={config.total_steps}; "
                "leave it out to follow total_steps"
            )


def _check_batch(config) -> None:
    batch, group = config.global_batch_size, config.group_size
    if batch % group:
        fits = [size for size in range(1, batch + 1) if batch % size == 0]
        best = sorted(sorted(fits, key=lambda size: abs(size - group))[:2])
        raise ConfigError(
            f"group_size={group} must divide global_batch_size={batch}; "
            f"nearest that do: {' and '.join(str(size) for size in best)}"
        )
    micro_batches = config.grad_accumulation_steps
    if (batch // group) % micro_batches:
        raise ConfigError(
            f"grad_accumulation_steps={micro_batches} must divide the {batch // group} groups "
            f"of a batch (global_batch_size / group_size)"
        )
    axes = (config.mesh.data, config.mesh.fsdp, config.mesh.model)
    if any(size == 0 or size < -1 for size in axes) or axes.count(-1) > 1:
        raise ConfigError(
            f"mesh (data, fsdp, model)={axes} must be device counts; one of them may be -1"
        )


def _check_eval(config) -> None:
    if config.eval.kind == "none":
        return
    for key in ("bank_path", "query_path"):
        if not config.eval[key]:
            raise ConfigError(f"eval.{key} must be set for eval.kind={config.eval.kind!r}")
    if config.eval.bank_path == config.eval.query_path:
        raise ConfigError(
            f"eval.bank_path and eval.query_path are both {config.eval.bank_path!r}: every query "
            "would find itself; use different images"
        )
    if config.eval.kind == "knn" and config.eval.crop_size_px > config.eval.resize_size_px:
        raise ConfigError(
            f"eval.crop_size_px={config.eval.crop_size_px} must be at most "
            f"eval.resize_size_px={config.eval.resize_size_px}"
        )
