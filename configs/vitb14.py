"""ViT-B/14 from scratch with the long recipe. Not an official recipe: the paper distils its ViT-B.

Command: `python -m dinov2_jax.train --config=configs/vitb14.py --config.data.path=/your/images`.
The schedules, losses and heads are those of ViT-L/14 (paper appendix B); the MLP backbone is the
released ViT-B's, with 12 blocks (the paper's table says 18: `--config.model.depth=18`). The drop
path rate is this configuration's own choice. There is no cited number for it, and none measured.
"""

from configs import base


def get_config():
    """Returns the ViT-B/14 configuration."""
    config = base.get_config()
    config.model.variant = "vit_base"
    config.model.ffn = "mlp"
    config.model.drop_path_rate = 0.2
    return config
