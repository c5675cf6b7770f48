"""Resizing the table of position embeddings: the reference's rules and others', exactly.

In: the stored table, CLS first, learned on a grid of patches. Out: the table for another grid.
Behaviour follows dinov2/models/vision_transformer.py (Apache-2.0), where PyTorch's bicubic
kernels do the work; here they are two small matrices, made in float64 on the host.
"""

import einops
import jax
import jax.numpy as jnp
import numpy as np

INTERPOLATIONS = ("offset", "plain", "antialias")

# Added to the new grid before the scale is taken, so that rounding cannot lose a patch
# (github.com/facebookresearch/dino/issues/8). The released weights were trained with it.
OFFSET = 0.1


def interpolate_pos_embed(
    pos_embed: jax.Array,
    *,
    stored_grid: tuple[int, int],
    grid: tuple[int, int],
    interpolation: str = "offset",
) -> jax.Array:
    """Position embeddings for a grid of patches.

    Args:
      pos_embed: stored table `[1, 1 + rows * cols, d]`, CLS first.
      stored_grid: rows and columns of the stored table, in patches.
      grid: rows and columns wanted, in patches. Equal to `stored_grid`: the table as it is.
      interpolation: "offset" (bicubic with a = -0.75, no antialiasing, scale taken from the grid
        plus 0.1: the reference's backbones without registers), "plain" (the same without the
        0.1: those in transformers) or "antialias" (bicubic with a = -0.5, antialiased like
        Pillow's: backbones with registers, and all of timm's).

    Returns:
      `[1, 1 + h * w, d]`, in the type of `pos_embed`; computed in float32.

    Raises:
      ValueError: an unknown rule, or a table that is not of `stored_grid`.
    """
    rows, cols = stored_grid
    if pos_embed.shape[1] != 1 + rows * cols:
        raise ValueError(
            f"{stored_grid=} must multiply to the number of stored positions, "
            f"{pos_embed.shape[1] - 1}; set pos_embed_grid to the grid that the table was made for"
        )
    if tuple(grid) == tuple(stored_grid):
        return pos_embed
    cls, table = pos_embed[:, :1], pos_embed[0, 1:].astype(jnp.float32)
    table = einops.rearrange(table, "(h w) d -> h w d", h=rows, w=cols)
    table = jnp.einsum(
        "yh,xw,hwd->yxd",
        resize_matrix(rows, grid[0], interpolation),
        resize_matrix(cols, grid[1], interpolation),
        table,
        precision=jax.lax.Precision.HIGHEST,
    )
    table = einops.rearrange(table, "h w d -> 1 (h w) d").astype(pos_embed.dtype)
    return jnp.concatenate([cls, table], axis=1)  # [1, 1 + n, d]


def resize_matrix(size: int, new_size: int, interpolation: str) -> np.ndarray:
    """One axis of the bicubic resampling, as a matrix.

    Args:
      size: length of the stored axis.
      new_size: length of the new axis.
      interpolation: "offset", "plain" or "antialias", see `interpolate_pos_embed`.

    Returns:
      float32 `[new_size, size]`; rows sum to 1.
    """
    positions = np.arange(new_size) + 0.5
    if interpolation in ("offset", "plain"):
        offset = OFFSET if interpolation == "offset" else 0.0
        source = positions * size / (new_size + offset) - 0.5
        taps = np.floor(source).astype(int)[:, None] + np.arange(-1, 3)  # [new_size, 4]
        weights = _cubic(source[:, None] - taps, a=-0.75)
        matrix = np.zeros((new_size, size))
        # Taps beyond the edge read the edge.
        np.add.at(matrix, (np.arange(new_size)[:, None], taps.clip(0, size - 1)), weights)
    elif interpolation == "antialias":
        scale = size / new_size
        source = positions * scale - 0.5
        distance = source[:, None] - np.arange(size)
        # A shrinking kernel grows with the scale; taps beyond the edge are left out.
        matrix = _cubic(distance / max(scale, 1.0), a=-0.5)
        matrix /= matrix.sum(axis=1, keepdims=True)
    else:
        raise ValueError(f"{interpolation=} must be one of {INTERPOLATIONS}; choose one of them")
    return matrix.astype(np.float32)


def _cubic(x: np.ndarray, *, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel: nonzero on (-2, 2), 1 at 0."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
