"""DINOv2 ViT-L/14 from scratch, the long recipe: paper appendix B, Tables 16-17 (arXiv:2304.07193).

Command: `python -m dinov2_jax.train --config=configs/vitl14.py --config.data.path=/your/images`.
Every value is the base's. Expected on ImageNet-22k, cited (paper Table 1, last row; never run
here): ImageNet-1k kNN 82.0, linear 84.5, after about 3.3 days on 96 A100 (reference's README).
"""

from configs import base


def get_config():
    """Returns the ViT-L/14 configuration."""
    return base.get_config()
