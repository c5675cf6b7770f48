"""Videos with masks in DAVIS' layout: frames and annotations, a folder for each clip."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from dinov2_jax.data.image_ops import IMAGE_SUFFIXES
from dinov2_jax.data.records import DataError
from dinov2_jax.evals.video_frames import in_time

LAYOUT = """
  JPEGImages/CLIP/00000.jpg ..     frames; their names are in the order of time
  Annotations/CLIP/00000.png ..    masks of the same names: the first is propagated, the others
                                   are scored, but for that of the last frame
  both also with a folder between, as JPEGImages/480p/CLIP. A mask is grey or has a palette, and
  holds the number of the object (0: none, 255: not scored); of 0 and 255 alone, 255 is an object"""
VOID = 255


@dataclasses.dataclass(frozen=True)
class Clip:
    """One video.

    Attributes:
      name: of its folder.
      frames: paths, in the order of time.
      masks: path of each frame's mask; None where it has none.
    """

    name: str
    frames: Sequence[pathlib.Path]
    masks: Sequence[pathlib.Path | None]

    def __post_init__(self):
        if self.masks[0] is None or not self.scored:
            raise DataError(
                f"clip {self.name} must have a mask of its first frame and of one between the first"
                " and the last; add them, or leave the clip out by --clips"
            )

    @property
    def scored(self) -> list[int]:
        """Frames whose masks are scored: not the first, which is given, nor the last."""
        return [i for i in range(1, len(self.frames) - 1) if self.masks[i] is not None]


def open_davis(data: str, *, names: Sequence[str] | None = None) -> list[Clip]:
    """The clips of a folder, by name.

    Args:
      data: see `LAYOUT`.
      names: of clips, or one .txt file that lists them, from `data` on; None: all.

    Raises:
      DataError: no clip there, one that is missing, or one without the masks that it needs.
    """
    root = pathlib.Path(data).expanduser()
    frames, masks = (_clips_folder(root, part) for part in ("JPEGImages", "Annotations"))
    there = sorted(x.name for x in frames.iterdir() if x.is_dir())
    if names and len(names) == 1 and names[0].endswith(".txt"):
        names = (root / pathlib.Path(names[0]).expanduser()).read_text().split()
    names = there if names is None else names
    missing = sorted(set(names) - set(there))
    if missing or not names:
        raise DataError(f"clips {missing[:3]} must be folders in {frames}; it has {there[:5]} ..")
    clips = []
    for name in names:
        images = _images(frames / name)
        found = {x.stem: x for x in _images(masks / name)}
        if not images:
            raise DataError(f"{frames / name} holds no frame; expected {LAYOUT}")
        clips.append(Clip(name, images, [found.get(x.stem) for x in images]))
    return clips


def read_masks(clip: Clip) -> tuple[list[np.ndarray | None], int]:
    """Object numbers uint8 `[height, width]` of each frame that has a mask; how many objects.

    Raises:
      DataError: a mask is no such image, or the first shows no object.
    """
    masks = [None if path is None else _read_mask(path) for path in clip.masks]
    shapes = {mask.shape for mask in masks if mask is not None}
    if len(shapes) > 1:
        raise DataError(f"masks of clip {clip.name} must have one size, found {sorted(shapes)[:3]}")
    if set(np.unique(masks[0])) <= {0, VOID}:  # as in DAVIS 2016
        masks = [None if mask is None else (mask == VOID).astype(np.uint8) for mask in masks]
    objects = masks[0][masks[0] != VOID]
    if not objects.max(initial=0):
        raise DataError(f"{clip.masks[0]} must show an object; there is nothing to propagate")
    return masks, int(objects.max())


def _read_mask(path: pathlib.Path) -> np.ndarray:
    try:
        with Image.open(path) as opened:
            if opened.mode not in ("P", "L", "1"):
                raise DataError(f"{path} must be grey or have a palette, not {opened.mode}")
            mask = np.asarray(opened)
    except (OSError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return np.where(mask, VOID, 0).astype(np.uint8) if mask.dtype == bool else mask


def _clips_folder(root: pathlib.Path, part: str) -> pathlib.Path:
    """The folder of clips: of the part itself, or of the one resolution in it."""
    folder = root / part
    if not folder.is_dir():
        raise DataError(f"{root} holds no {part}; expected {LAYOUT}")
    inner = sorted(x for x in folder.iterdir() if x.is_dir())
    if inner and not any(map(_images, inner)):
        if len(inner) > 1:
            names = [x.name for x in inner]
            raise DataError(f"{folder} must hold clips, or one resolution, not {names[:3]}")
        return inner[0]
    return folder


def _images(folder: pathlib.Path) -> list[pathlib.Path]:
    if not folder.is_dir():
        return []
    images = (x for x in folder.iterdir() if x.suffix.lower() in IMAGE_SUFFIXES)
    return sorted((x for x in images if x.name[0] != "."), key=lambda x: in_time(x.name))
