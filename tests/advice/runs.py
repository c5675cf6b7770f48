"""Two runs that every test of the advice starts from."""

from dinov2_jax.advice.settings import RunSettings

PAPER = RunSettings(
    num_images=14_000_000,
    global_batch_size=3072,
    total_steps=625_000,
    group_size=32,
    num_batch_pieces=96,
    embed_dim=1024,
    layer_scale_init=1e-5,
    patch_size=14,
    global_crop_size_px=224,
    local_crop_size_px=98,
    num_local_crops=8,
    mask_probability=0.5,
    mask_ratio_min=0.1,
    mask_ratio_max=0.5,
    dino_weight=1.0,
    ibot_weight=1.0,
    koleo_weight=0.1,
    has_separate_head=True,
    dino_prototypes=131_072,
    ibot_prototypes=131_072,
    centering="sinkhorn_knopp",
    center_momentum=0.9,
    teacher_temp_start=0.04,
    teacher_temp=0.07,
    momentum_start=0.994,
    momentum_end=1.0,
    base_learning_rate=2e-4,
    learning_rate_scaling="sqrt_1024",
    layerwise_lr_decay=1.0,
    warmup_steps=100_000,
    freeze_last_layer_steps=1_250,
)
# The paper's values at a size that they do not fit: 9,000 images of 64 px in batches of 64.
SMALL = {
    "num_images": 9_000,
    "global_batch_size": 64,
    "total_steps": 3_000,
    "num_batch_pieces": 1,
    "embed_dim": 160,
    "patch_size": 8,
    "global_crop_size_px": 64,
    "local_crop_size_px": 32,
    "warmup_steps": 480,
    "freeze_last_layer_steps": 6,
}
# The field of RunSettings that holds a key of configs/base.py.
FIELDS = {
    "dino.num_prototypes": "dino_prototypes",
    "ibot.num_prototypes": "ibot_prototypes",
    "teacher.momentum_start": "momentum_start",
    "optim.base_learning_rate": "base_learning_rate",
    "optim.warmup_steps": "warmup_steps",
    "centering.teacher_temp_start": "teacher_temp_start",
    "centering.teacher_temp": "teacher_temp",
    "model.layer_scale_init": "layer_scale_init",
    "group_size": "group_size",
}
