"""Small images or few of them, one device: 64 px photographs, patch 8, a ViT of width 128.

Command: `python -m dinov2_jax.train --config=configs/small.py --config.data.path=/your/images`.
Hardware: 2 CPU cores for an hour, or any accelerator. The paper's settings do not carry over to
thousands of images and steps; docs/learning.md has the runs that decided these, curves of a healthy
and of a slow run, and what to change when yours is not healthy. `--suggest` fits other sizes.

With labelled images, add the in-run kNN: `--config.eval.kind=knn`, `--config.eval.bank_path=` the
training images and `--config.eval.query_path=` others.
"""

from configs import base


def get_config():
    """Returns the configuration for small data."""
    config = base.get_config()
    config.total_steps = 3_000
    total_steps = config.get_ref("total_steps")
    config.global_batch_size = 64
    config.group_size = 64
    # One device is enough, and one group needs one batch shard.
    config.mesh.data = 1

    # Crops enlarge what they show; features are taken of whole images, where it is smaller.
    config.crops.global_crop_size_px = 48
    config.crops.local_crop_size_px = 24
    config.crops.num_local_crops = 4
    # Milder than the paper's, whose local crops are from a twentieth of what are small images here.
    config.crops.global_crop_scale = (0.4, 1.0)
    config.crops.local_crop_scale = (0.15, 0.4)
    config.augment.brightness = 0.2
    config.augment.contrast = 0.2
    config.augment.saturation = 0.1
    config.augment.hue = 0.03
    config.augment.grayscale_probability = 0.1

    config.model.variant = "custom"
    config.model.patch_size = 8
    config.model.embed_dim = 128
    config.model.depth = 6
    config.model.num_heads = 4
    config.model.ffn = "mlp"
    config.model.layer_scale_init = 0.1
    config.model.drop_path_rate = 0.0

    for head in (config.dino, config.ibot):
        head.num_prototypes = 256
        head.hidden_dim = 512
        head.bottleneck_dim = 128

    # At 0.04 the targets are so even that the same kNN takes more than twice as many images.
    config.centering.teacher_temp_start = 0.02
    config.centering.teacher_temp = 0.02
    # With a rate falling to 0 and a momentum rising to 1, kNN stood still after a third of its run.
    config.teacher.momentum_start = 0.96
    config.teacher.momentum_end = 0.98
    config.optim.base_learning_rate = 1e-3
    config.optim.min_learning_rate = 1e-3
    config.optim.learning_rate_scaling = "none"
    config.optim.warmup_steps = total_steps * 1 // 20
    config.optim.freeze_last_layer_steps = total_steps * 1 // 100

    config.checkpoint_every_steps = 200
    config.eval_every_steps = 200
    config.teacher_every_steps = 200
    config.eval.resize_size_px = 64
    config.eval.crop_size_px = 64
    return config
