"""Which patches of two photos correspond: mutual nearest neighbours, joined by lines."""

import colorsys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import ImageDraw

from dinov2_jax.neighbors import nearest_neighbors
from dinov2_jax.visualize.photos import Photo
from dinov2_jax.visualize.sheets import MARGIN_PX, Cell, Sheet, beside, photo_tile

_GOLDEN_RATIO = 0.618034
_SUPERSAMPLING = 2  # Pillow's lines have hard edges


class Matches(NamedTuple):
    """Corresponding patches of two photos, the most similar first."""

    first: np.ndarray  # int [matches, 2]: row and column in the first photo's grid
    second: np.ndarray  # int [matches, 2]: in the second's
    similarity: np.ndarray  # float32 [matches]: cosine


def mutual_matches(
    first: np.ndarray,
    second: np.ndarray,
    *,
    foreground: Sequence[np.ndarray] | None = None,
    num_matches: int | None = None,
) -> Matches:
    """Pairs of patches, each of which is the other's most similar in its photo, by cosine.

    Args:
      first: patch features `[h, w, d]`.
      second: of the other photo, likewise; its size may differ.
      foreground: bool `[h, w]` of the two photos: the patches that take part; None: all.
      num_matches: how many of the most similar pairs; None: all.

    Raises:
      ValueError: no patch of one photo takes part.
    """
    grids = (first, second)
    shown = foreground or [np.ones(grid.shape[:2], bool) for grid in grids]
    if not all(mask.any() for mask in shown):
        raise ValueError(
            "both photos must have foreground patches, one has none; lower the threshold, or "
            "match without foreground"
        )
    a, b = (grid[mask] for grid, mask in zip(grids, shown, strict=True))
    similarities, b_of_a = (x[:, 0] for x in nearest_neighbors(a, b, k=1))
    a_of_b = nearest_neighbors(b, a, k=1)[1][:, 0]
    is_mutual = a_of_b[b_of_a] == np.arange(len(a))
    order = np.argsort(-similarities[is_mutual], kind="stable")[:num_matches]
    picked = np.flatnonzero(is_mutual)[order]
    where_a, where_b = (np.argwhere(mask) for mask in shown)
    return Matches(where_a[picked], where_b[b_of_a[picked]], similarities[picked])


def matches_sheet(
    photos: tuple[Photo, Photo], matches: Matches, *, patch_size: int, tile_px: int = 560
) -> Sheet:
    """Draws two photos side by side with a line for each match.

    Args:
      photos: as the network saw them.
      matches: of `mutual_matches`.
      patch_size: px of the photos.
      tile_px: width of each photo.
    """
    big_px, gap_px = tile_px * _SUPERSAMPLING, MARGIN_PX * _SUPERSAMPLING
    pair = beside([photo_tile(photo.pixels, big_px) for photo in photos], gap_px)
    draw = ImageDraw.Draw(pair)
    lefts = (0, big_px + gap_px)
    for i, places in enumerate(zip(matches.first, matches.second, strict=True)):
        color = distinct_color(i)
        ends = []
        for photo, left, (row, column) in zip(photos, lefts, places, strict=True):
            zoom = big_px / photo.pixels.shape[1]
            x, y = ((c + 0.5) * patch_size * zoom for c in (column, row))
            ends.append((left + x, y))
        draw.line(ends, color, width=round(1.5 * _SUPERSAMPLING))
        for end in ends:
            draw.circle(end, 3.5 * _SUPERSAMPLING, color, (255, 255, 255), _SUPERSAMPLING)
    pair = pair.resize((pair.width // _SUPERSAMPLING, pair.height // _SUPERSAMPLING))
    caption = (
        f"Pairs of patches, each the other's most similar: {len(matches.similarity)}, of cosine "
        f"similarity {matches.similarity[-1]:.3f} to {matches.similarity[0]:.3f}."
    )
    name = f"{photos[0].name} and {photos[1].name}"
    return Sheet("Patches that correspond", caption, [Cell(pair, name)])


def distinct_color(i: int) -> tuple[int, int, int]:
    """Hues a golden section apart: the next is far from the last ones, and none comes twice."""
    lightness = (0.5, 0.65, 0.4)[i % 3]
    return tuple(round(255 * x) for x in colorsys.hls_to_rgb(i * _GOLDEN_RATIO % 1, lightness, 1))
