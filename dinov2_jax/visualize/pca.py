"""Principal components of patch features as colours, with the background left out.

In: grids `[h, w, d]` of patch features, of all photos together. Out: masks, colours, a sheet.
After Figure 1 of the paper: the first component is cut at a threshold, and a second PCA, of what
remains in all photos, gives red, green and blue.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from dinov2_jax.visualize.photos import Photo
from dinov2_jax.visualize.sheets import GAP_PX, Cell, Sheet, beside, photo_tile, zoomed


def foreground_masks(
    grids: Sequence[np.ndarray], *, threshold: float = 0.0, flip: bool = False
) -> list[np.ndarray]:
    """Tells objects from their background by the first principal component of all photos.

    A component has no sign of its own. Rule: the foreground is the side on which the outermost
    patches of the photos lie less, on average, than the patches inside; `flip` takes the other.

    Args:
      grids: patch features `[h, w, d]` of each photo.
      threshold: foreground scores above it, in standard deviations of the component; 0: its mean.
      flip: whether the component is negated.

    Returns:
      bool `[h, w]` of each photo, True: foreground.

    Raises:
      ValueError: no patch is foreground.
    """
    scores = _principal_scores(_flat(grids), 1)[:, 0]
    is_border = np.concatenate([_border(*grid.shape[:2]).ravel() for grid in grids])
    if not is_border.all() and scores[is_border].mean() > scores[~is_border].mean():
        scores = -scores
    scores = scores / max(scores.std(), np.finfo(np.float64).tiny) * (-1 if flip else 1)
    if not (scores > threshold).any():
        raise ValueError(
            f"{threshold=} must be below the highest score, {scores.max():.2f}; no patch is "
            "foreground: lower it"
        )
    return _like(scores > threshold, grids)


def pca_colors(
    grids: Sequence[np.ndarray], *, foreground: Sequence[np.ndarray] | None = None
) -> list[np.ndarray]:
    """Patch features as colours: one PCA over the patches of all photos together.

    Equal colours therefore mean similar features, across photos too. The sign of a component is
    fixed (its largest loading is positive); its 2nd to 98th percentile fill the range of a colour.

    Args:
      grids: patch features `[h, w, d]` of each photo.
      foreground: bool `[h, w]` of each: the patches that are analysed, all others become black;
        None: all.

    Returns:
      uint8 `[h, w, 3]` of each photo.

    Raises:
      ValueError: a feature is not finite.
    """
    flat = _flat(grids)
    is_shown = np.ones(len(flat), bool) if foreground is None else _flat(foreground, width=False)
    scores = _principal_scores(flat[is_shown], 3)
    low, high = np.percentile(scores, [2, 98], axis=0)
    # A component without spread (collapsed features) becomes a flat grey.
    is_flat = high - low < 1e-9
    unit = np.where(is_flat, 0.5, (scores - low) / np.where(is_flat, 1, high - low))
    colors = np.zeros((len(flat), 3), np.uint8)
    colors[is_shown] = np.clip(255 * unit, 0, 255).round()
    return _like(colors, grids)


def pca_sheet(
    photos: Sequence[Photo],
    columns: Mapping[str, Sequence[np.ndarray]],
    *,
    has_background: bool = True,
    tile_px: int = 140,
) -> Sheet:
    """Draws each photo beside its patches in the colours of `pca_colors`.

    Args:
      photos: as the network saw them.
      columns: colours uint8 `[h, w, 3]` of each photo, by a title such as "trained" or "before
        training": a column each.
      has_background: whether the background was left in.
      tile_px: width of a photo.
    """
    cells = []
    for i, photo in enumerate(photos):
        tiles = [photo_tile(photo.pixels, tile_px)]
        tiles += [zoomed(x[i], tile_px, Image.Resampling.NEAREST) for x in columns.values()]
        cells.append(Cell(beside(tiles), photo.name))
    headers = [(title, i * (tile_px + GAP_PX)) for i, title in enumerate(["photo", *columns])]
    caption = (
        "Each square is a patch, coloured by the first three principal components of the patch "
        "features of all these photos together: like colours are like features, also across "
        "photos."
    )
    if not has_background:
        caption += " Black is background by the first component of a PCA before."
    if len(columns) > 1:
        caption += " Each column has components of its own."
    return Sheet("What the patch features tell apart", caption, cells, headers)


def _principal_scores(flat: np.ndarray, count: int) -> np.ndarray:
    """Scores `[rows, count]` on the largest components of `[rows, d]`; signs as `pca_colors`."""
    if not np.isfinite(flat).all():
        raise ValueError("patch features must be finite; the network has produced NaN or infinity")
    flat = flat - flat.mean(axis=0)
    components = np.linalg.eigh(flat.T @ flat)[1][:, ::-1][:, :count]  # largest first
    largest = components[np.abs(components).argmax(axis=0), np.arange(count)]
    return flat @ (components * np.where(largest < 0, -1, 1))


def _border(h: int, w: int) -> np.ndarray:
    is_border = np.ones((h, w), bool)
    is_border[1:-1, 1:-1] = False
    return is_border


def _flat(grids: Sequence[np.ndarray], *, width: bool = True) -> np.ndarray:
    """All grids in one: float64 `[patches of all photos, d]`, or the masks `[patches ..]`."""
    if width:
        return np.concatenate([x.reshape(-1, x.shape[-1]) for x in grids]).astype(np.float64)
    return np.concatenate([x.ravel() for x in grids])


def _like(flat: np.ndarray, grids: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Undoes `_flat`: cut at the photos, `[h, w, ..]` each."""
    ends = np.cumsum([grid.shape[0] * grid.shape[1] for grid in grids])
    parts = np.split(flat, ends[:-1])
    return [x.reshape(*g.shape[:2], *x.shape[1:]) for x, g in zip(parts, grids, strict=True)]
