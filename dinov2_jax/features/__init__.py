"""Features of any folder, list, tar or ArrayRecord of images, on disk.

`extract` writes them, resumably, and `read` opens them: arrays, and a table of ids, paths and
labels. `python -m dinov2_jax.features IMAGES OUT --model MODEL` is the command.
"""

from dinov2_jax.features.extract import extract
from dinov2_jax.features.fill import Report
from dinov2_jax.features.read import FeatureSet, read

__all__ = ["FeatureSet", "Report", "extract", "read"]
