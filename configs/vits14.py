"""ViT-S/14 from scratch with the long recipe. Not an official recipe: the paper distils its ViT-S.

Command: `python -m dinov2_jax.train --config=configs/vits14.py --config.data.path=/your/images`.
The schedules, losses and heads are those of ViT-L/14 (paper appendix B); the MLP backbone is the
released ViT-S's, and the drop path rate is this configuration's own choice. There is no cited
number for it, and none measured.
"""

from configs import base


def get_config():
    """Returns the ViT-S/14 configuration."""
    config = base.get_config()
    config.model.variant = "vit_small"
    config.model.ffn = "mlp"
    config.model.drop_path_rate = 0.1
    return config
