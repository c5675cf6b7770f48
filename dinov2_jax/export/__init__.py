"""Models for other runtimes: StableHLO and ONNX files, checked before they get their name.

`export_model` is the function; `python -m dinov2_jax.export` is the command.
"""

from dinov2_jax.export.check import ExportError
from dinov2_jax.export.write import export_model

__all__ = ["ExportError", "export_model"]
