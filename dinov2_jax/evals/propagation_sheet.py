"""Propagated masks over their frames, and where the true ones end: a row for each clip."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from dinov2_jax.evals.davis import VOID, Clip
from dinov2_jax.evals.mask_scores import boundary, dilated
from dinov2_jax.preprocess import read_image
from dinov2_jax.visualize.photos import spaced_rows
from dinov2_jax.visualize.sheets import Cell, Sheet, beside, named, photo_tile

# Of object 1, 2 ..: told apart without red against green (Okabe and Ito).
COLORS = np.array(
    [
        (230, 159, 0),
        (86, 180, 233),
        (0, 158, 115),
        (240, 228, 66),
        (0, 114, 178),
        (213, 94, 0),
        (204, 121, 167),
    ],
    np.uint8,
)
_OPACITY = 0.55


def palette() -> list[int]:
    """256 colours for a PNG of object numbers: 0 is black."""
    colors = np.zeros((256, 3), np.uint8)
    colors[1:] = COLORS[np.arange(255) % len(COLORS)]
    return colors.ravel().tolist()


def overlay(image: np.ndarray, mask: np.ndarray, truth: np.ndarray | None) -> np.ndarray:
    """The frame with each object's colour over it, and the true outlines in white.

    Args:
      image: uint8 `[height, width, 3]`.
      mask: object numbers `[height, width]`.
      truth: likewise; None: unknown.
    """
    colored = COLORS[(mask.astype(int) - 1) % len(COLORS)]
    mixed = np.where(
        (mask > 0)[..., None], (1 - _OPACITY) * image + _OPACITY * colored, image.astype(float)
    )
    if truth is not None:
        numbers = [x for x in np.unique(truth) if x not in (0, VOID)]
        edges = [dilated(boundary(truth == x), 1) for x in numbers]
        mixed[np.any(edges, axis=0) if edges else np.zeros_like(mask, bool)] = 255
    return np.rint(mixed).astype(np.uint8)


def propagation_sheet(
    clips: Sequence[Clip],
    masks_of: Callable[[Clip], Sequence[np.ndarray]],
    truths_of: Callable[[Clip], Sequence[np.ndarray | None]],
    notes: Mapping[str, str],
    *,
    num_clips: int = 6,
    num_frames: int = 5,
    tile_px: int = 240,
) -> Sheet:
    """Draws evenly spaced frames of evenly spaced clips.

    Args:
      clips: in the order of the sheet.
      masks_of, truths_of: object numbers of each frame of a clip.
      notes: stands below a row, by name of the clip.
      num_clips, num_frames: at most.
      tile_px: width of a frame.
    """
    cells = []
    chosen = [clips[i] for i in spaced_rows(len(clips), num_clips)]
    for clip in chosen:
        tiles, masks, truths = [], masks_of(clip), truths_of(clip)
        count = min(num_frames, len(clip.frames))
        for i in np.linspace(0, len(clip.frames) - 1, count).round().astype(int).tolist():
            image = Image.fromarray(read_image(clip.frames[i]))
            image = image.resize(masks[i].shape[::-1], Image.Resampling.BICUBIC)
            frame = overlay(np.asarray(image), masks[i], truths[i])
            tiles.append(named(photo_tile(frame, tile_px), clip.frames[i].stem))
        cells.append(Cell(beside(tiles), notes[clip.name]))
    caption = (
        "Colours: masks carried on from the first frame. White: the outlines of the true masks. "
        f"{len(chosen)} of {len(clips)} clips."
    )
    return Sheet("Label propagation", caption, cells, width_px=0)
