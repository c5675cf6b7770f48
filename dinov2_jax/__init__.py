"""DINOv2 (Oquab et al., 2023, arXiv:2304.07193) in JAX and Flax.

Axis legend: the same letters in comments, einsum, einops and docstrings.

    b images in the global batch      n patches (inside a block: tokens)
    g global crops (2)                r register tokens
    l local crops (8)                 d embedding width
    s groups                          k prototypes
    q images in a group               m mask slots of a group, padded
    h, w patch-grid rows and columns; height, width pixels; c colour channels (last)
    heads, hd attention heads, head width

Images are NHWC, grids row-major `(h w)`, tokens ordered `[cls, registers, patches]`.
Importing this package imports nothing heavy: neither jax nor flax. `dinov2_jax.load` gives a model
to use; all else is imported by its room, such as `dinov2_jax.models.vit`.
"""

__version__ = "0.1.0"
__all__ = ["Model", "load"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dinov2_jax import model

    return getattr(model, name)
