"""Patch features of photos as grids, checked: what PCA and matches draw.

A grid is float32 `[h, w, d]`; the grids of several photos may differ in rows and columns.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np

from dinov2_jax.augment import normalize
from dinov2_jax.model import Model
from dinov2_jax.visualize.photos import Photo

# A photo of so many patches takes n x n numbers a head: a mistaken size would take all memory.
MAX_PATCHES = 16_384
# Float32 rounds at 1e-7; features that differ less than this relative to their length hold noise.
MIN_SPREAD = 1e-5


def patch_grids(
    model: Model, photos: Sequence[Photo], *, block: int | None = None
) -> list[np.ndarray]:
    """Patch features of photos, each at its own size.

    Args:
      model: of `dinov2_jax.load`.
      photos: sides must be multiples of the patch.
      block: whose output is taken, counted from 0, after the final normalisation; None: the last.

    Returns:
      float32 `[h, w, d]` each.

    Raises:
      ValueError: features that are not finite or all equal, a block that does not exist, or a
        photo of more than `MAX_PATCHES` patches.
    """
    layers = 1 if block is None else [block]
    grids = []
    for photo in photos:
        (output,) = model.intermediate_layers(normalized(model, photo), layers, reshape=True)
        grids.append(np.asarray(output.patches[0], np.float32))
    check_features(np.concatenate([x.reshape(-1, x.shape[-1]) for x in grids]), "patch features")
    return grids


def check_size(size_px: int, patch_size: int) -> None:
    """Raises ValueError where even a square of this side has more than `MAX_PATCHES` patches."""
    if (size_px // patch_size) ** 2 > MAX_PATCHES:
        raise ValueError(
            f"size_px={size_px} makes more than {MAX_PATCHES} patches of an image; lower it to "
            f"{math.isqrt(MAX_PATCHES) * patch_size} or less"
        )


def normalized(model: Model, photo: Photo) -> jax.Array:
    """One photo as the model takes it, `[1, height, width, c]`. Raises as `patch_grids`."""
    height, width = photo.pixels.shape[:2]
    num_patches = height * width // model.spec.patch_size**2
    if num_patches > MAX_PATCHES:
        raise ValueError(
            f"{photo.name} has {num_patches} patches at {width} x {height} px, more than "
            f"{MAX_PATCHES}; lower the size, or take its centred square"
        )
    return normalize(photo.pixels[None], mean=model.spec.mean, std=model.spec.std)


def check_features(features: np.ndarray, what: str) -> None:
    """Raises ValueError, naming `what`, for features `[rows, d]` that nothing can be drawn from."""
    is_bad = ~np.isfinite(features).all(axis=1)
    if is_bad.any():
        raise ValueError(
            f"{what} must be finite, {is_bad.sum()} of {len(is_bad)} are not; the network has "
            "diverged, or its file is damaged"
        )
    spread = np.linalg.norm(features - features.mean(axis=0))
    if spread <= MIN_SPREAD * np.linalg.norm(features):
        raise ValueError(
            f"{what} must differ, these {len(features)} are equal; the network has collapsed: take "
            "another checkpoint"
        )
