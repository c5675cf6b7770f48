"""DINOv2 ViT-g/14 from scratch, the long recipe: paper appendix B, Tables 16-17 (arXiv:2304.07193).

Command: `python -m dinov2_jax.train --config=configs/vitg14.py --config.data.path=/your/images`.
Differs from ViT-L/14 by the backbone and by 12 images a group (the reference's per-GPU batch).
Expected, cited (paper Table 2 and model card; never run here): trained on LVD-142M, linear 85.8 on
ImageNet-1k, 22,016 A100 hours; on ImageNet-22k, linear 85.9. The state is about 19 GB in float32:
set `--config.mesh.fsdp` to 4 or more devices.
"""

from configs import base


def get_config():
    """Returns the ViT-g/14 configuration."""
    config = base.get_config()
    config.model.variant = "vit_giant2"
    config.group_size = 12
    return config
