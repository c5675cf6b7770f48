"""Images made on the spot: smooth enough for JPEG, different from each other."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image


def make_image(seed: int, *, height: int = 48, width: int = 64, channels: int = 3) -> np.ndarray:
    """uint8 [height, width, channels], a few random waves."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[:height, :width] / 16
    waves = [np.sin(a * rows + b * cols + c) for a, b, c in rng.uniform(0.5, 3, (channels, 3))]
    return np.uint8(127.5 + 127 * np.stack(waves, axis=-1))


def encode(image: np.ndarray | Image.Image, format: str = "JPEG", **options) -> bytes:
    """Image file as bytes."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image.squeeze())
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def photo_folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """24 JPEG files in 3 class folders."""
    folder = tmp_path / "photos"
    for i in range(24):
        path = folder / f"class_{i % 3}" / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(make_image(i, height=40 + i, width=72 - i)))
    return folder
