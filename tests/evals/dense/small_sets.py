"""Small data sets on disk whose answers are known: squares of colour, each colour a class."""

import pathlib

import numpy as np
from PIL import Image

COLORS = np.array([[200, 40, 40], [40, 180, 60], [50, 60, 220]], np.uint8)
CELL_PX = 14


def color_grid(rng: np.random.Generator, rows: int = 3, columns: int = 4) -> np.ndarray:
    """Random classes of cells, as pixels `[height, width]`."""
    cells = rng.integers(0, len(COLORS), (rows, columns))
    return cells.repeat(CELL_PX, axis=0).repeat(CELL_PX, axis=1)


def save_pair(folder: tuple[pathlib.Path, pathlib.Path], name: str, image, target) -> None:
    """Writes an image and its target as PNG; targets of more than 255 get 16 bits."""
    for place, pixels in zip(folder, (image, target), strict=True):
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{name}.png")


def save_masks(root: pathlib.Path, *, num_train: int = 6, num_val: int = 3) -> pathlib.Path:
    """A set in the layout of CamVid; 255 is ignored, a row of each mask."""
    rng = np.random.default_rng(0)
    for split, count in (("train", num_train), ("val", num_val)):
        for i in range(count):
            classes = color_grid(rng)
            image = COLORS[classes]
            mask = classes.astype(np.uint8)
            mask[0] = 255
            save_pair((root / split, root / f"{split}annot"), f"{split}{i}", image, mask)
    return root


def save_depths(root: pathlib.Path, *, num_images: int = 8) -> pathlib.Path:
    """A set without splits; a colour is 1, 2 or 3 m away, the left column was not measured."""
    rng = np.random.default_rng(0)
    for i in range(num_images):
        classes = color_grid(rng)
        depth = (1000 * (1 + classes)).astype(np.uint16)
        depth[:, 0] = 0
        save_pair((root / "color", root / "depth"), f"frame{i}", COLORS[classes], depth)
    return root
