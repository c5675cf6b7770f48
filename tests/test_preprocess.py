"""Any kind of image becomes the same normalised array."""

import io

import numpy as np
import pytest
from PIL import Image

from dinov2_jax.preprocess import preprocess, resize_to_patches

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
SETTINGS = dict(mean=MEAN, std=STD, resize_size_px=16, crop_size_px=12, patch_size=4)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8)


def expected(pixels: np.ndarray) -> np.ndarray:
    """The reference's evaluation transform, by Pillow: short side 16, centre 12."""
    resized = Image.fromarray(pixels).resize((int(16 * 31 / 20), 16), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 12) / 2), round((resized.height - 12) / 2)
    crop = np.asarray(resized.crop((left, top, left + 12, top + 12)), np.float64) / 255
    return ((crop - MEAN) / STD)[None]


def encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def test_every_kind_of_image_gives_the_references_pixels(pixels, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(encoded(pixels))
    kinds = [path, str(path), path.read_bytes(), Image.fromarray(pixels), pixels]
    kinds += [pixels.astype(np.uint16) * 257, (pixels / 255).astype(np.float32)]
    for image in kinds:
        batch = preprocess(image, **SETTINGS)
        assert batch.dtype == np.float32
        np.testing.assert_allclose(batch, expected(pixels), atol=1e-6)
    batch = preprocess(kinds, **SETTINGS)
    np.testing.assert_allclose(batch, np.repeat(expected(pixels), len(kinds), 0), atol=1e-6)
    batch = preprocess(np.stack([pixels, pixels]), **SETTINGS)
    np.testing.assert_allclose(batch, np.repeat(expected(pixels), 2, 0), atol=1e-6)


def test_modes_of_pillow_become_the_channels_of_the_mean(pixels):
    gray = Image.fromarray(pixels).convert("L")
    batch = preprocess(gray, **SETTINGS)
    np.testing.assert_allclose(
        batch, expected(np.asarray(gray)[..., None].repeat(3, -1)), atol=1e-6
    )
    one = preprocess(Image.fromarray(pixels), **SETTINGS | dict(mean=(0.0,), std=(1.0,)))
    assert one.shape == (1, 12, 12, 1)
    alpha = Image.fromarray(np.dstack([pixels, np.full((20, 31), 7, np.uint8)]))
    np.testing.assert_allclose(preprocess(alpha, **SETTINGS), expected(pixels), atol=1e-6)


def test_without_a_crop_sides_go_to_the_nearest_multiples_of_the_patch(pixels):
    batch = preprocess(pixels, **SETTINGS | dict(crop_size_px=None))
    assert batch.shape == (1, 16, 24, 3)  # 24.8 px
    assert resize_to_patches(pixels, 16, 14).shape == (14, 28, 3)
    assert resize_to_patches(pixels, 3, 14).shape == (14, 14, 3)  # never nothing


def test_errors_say_what_is_wrong(pixels, tmp_path):
    with pytest.raises(ValueError, match="at least one image"):
        preprocess([], **SETTINGS)
    with pytest.raises(ValueError, match="crop_size_px=12 must not exceed resize_size_px=8"):
        preprocess(pixels, **SETTINGS | dict(resize_size_px=8))
    with pytest.raises(ValueError, match=r"must have one size, these have \[\(16, 16\), \(16, 24"):
        preprocess([pixels, pixels[:, :20]], **SETTINGS | dict(crop_size_px=None))
    (tmp_path / "bad.png").write_bytes(encoded(pixels)[:90])
    with pytest.raises(ValueError, match=r"bad\.png cannot be used: .*truncated"):
        preprocess(tmp_path / "bad.png", **SETTINGS)
    with pytest.raises(ValueError, match=r"8000 x 1 pixels would become .*, above the limit"):
        resize_to_patches(np.zeros((1, 8000, 3), np.uint8), 256, 14)
    with pytest.raises(FileNotFoundError):
        preprocess(tmp_path / "missing.png", **SETTINGS)
    cut = io.BytesIO(encoded(pixels)[:-400])
    with pytest.raises(ValueError, match=r"the image cannot be used: .*truncated"):
        preprocess(Image.open(cut), **SETTINGS)
    with pytest.raises(ValueError, match=r"it is an iterator; pass list\(images\)"):
        preprocess(tmp_path.glob("*.png"), **SETTINGS)
    with pytest.raises(ValueError, match="the image cannot be used: float values outside"):
        preprocess(pixels.astype(np.float32), **SETTINGS)
