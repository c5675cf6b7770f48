"""DINOv2 ViT-L/16, the reference's short recipe (its `configs/ssl_default_config.yaml`).

Command: `python -m dinov2_jax.train --config=configs/vitl16_short.py
--config.data.path=/data/imagenet/train`. Softmax centering, one head for both losses, layer-wise
learning-rate decay 0.9. Expected on ImageNet-1k, cited (reference's README; never run here): kNN
81.6, linear 82.9, after about a day on 32 A100. Cited too: at batch 512 instead of 2048, kNN 77.4.
"""

from configs import base


def get_config():
    """Returns the short ViT-L/16 configuration."""
    config = base.get_config()
    config.total_steps = 125_000
    total_steps = config.get_ref("total_steps")
    config.global_batch_size = 2048
    config.group_size = 64

    config.crops.local_crop_size_px = 96
    config.model.patch_size = 16
    config.model.ffn = "mlp"
    config.model.drop_path_rate = 0.3

    config.dino.num_prototypes = 65_536
    config.dino.bottleneck_dim = 256
    config.ibot.separate_head = False
    config.centering.kind = "softmax_center"
    config.centering.teacher_temp_warmup_steps = total_steps * 37_500 // 125_000

    config.teacher.momentum_start = 0.992
    config.optim.base_learning_rate = 4e-3
    config.optim.warmup_steps = total_steps * 12_500 // 125_000
    config.optim.freeze_last_layer_steps = total_steps * 1_250 // 125_000
    config.optim.weight_decay_end = 0.4
    config.optim.layerwise_lr_decay = 0.9

    config.eval_every_steps = total_steps * 12_500 // 125_000
    config.teacher_every_steps = total_steps * 12_500 // 125_000
    return config
