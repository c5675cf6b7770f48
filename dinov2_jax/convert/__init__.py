"""Weights in and out: any public DINOv2 file becomes ours, and ours becomes theirs, exactly.

`read_model` and `write_model` are the functions; `python -m dinov2_jax.convert` is the command.
Rules are tables (`rules`, `huggingface`, `timm`), the engine is `state_dict`. Numpy only, but for
`.pth` (PyTorch, an extra) and Orbax, each imported where it is used.
"""

from dinov2_jax.convert.read import read_model
from dinov2_jax.convert.spec import ModelSpec
from dinov2_jax.convert.state_dict import ConversionError
from dinov2_jax.convert.write import write_model

__all__ = ["ConversionError", "ModelSpec", "read_model", "write_model"]
