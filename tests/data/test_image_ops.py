"""Decoding of every format and mode against Pillow's convert, damaged files, and resizing."""

import warnings

import numpy as np
import pytest
from PIL import Image

from dinov2_jax.data.image_ops import (
    decode,
    image_format,
    resize_box,
    resize_center_crop,
    to_pillow,
)
from dinov2_jax.data.records import BadImage
from tests.data.conftest import encode, make_image

RGB = make_image(0)
GRAY = make_image(1, channels=1)
RGBA = make_image(2, channels=4)
GRAY_ALPHA = Image.merge("LA", [Image.fromarray(RGBA[:, :, i]) for i in (0, 3)])
PALETTE = Image.fromarray(RGB).quantize(32)
BILEVEL = Image.fromarray(GRAY[:, :, 0]).convert("1")
CMYK = Image.fromarray(RGB).convert("CMYK")


def _reference(content: bytes, mode: str = "RGB") -> np.ndarray:
    """The reference's decoder, as it is written there."""
    import io

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = np.array(Image.open(io.BytesIO(content)).convert(mode))
    return image.reshape(*image.shape[:2], -1)


FILES = {
    "jpeg": encode(RGB),
    "jpeg_420": encode(RGB, subsampling="4:2:0", quality=50),
    "jpeg_444": encode(RGB, subsampling="4:4:4"),
    "jpeg_odd_size": encode(make_image(3, height=31, width=17)),
    "jpeg_progressive": encode(RGB, progressive=True),
    "jpeg_gray": encode(GRAY),
    "jpeg_cmyk": encode(CMYK),
    "png": encode(RGB, "PNG"),
    "png_gray": encode(GRAY, "PNG"),
    "png_alpha": encode(RGBA, "PNG"),
    "png_gray_alpha": encode(GRAY_ALPHA, "PNG"),
    "png_palette": encode(PALETTE, "PNG"),
    "png_palette_one_clear": encode(PALETTE, "PNG", transparency=3),
    "png_palette_alpha": encode(PALETTE, "PNG", transparency=bytes(range(0, 256, 8))),
    "png_bilevel": encode(BILEVEL, "PNG"),
    "png_interlaced_gray_clear": encode(GRAY, "PNG", transparency=7),
    "webp": encode(RGB, "WEBP"),
    "webp_lossless_alpha": encode(RGBA, "WEBP", lossless=True),
    "bmp": encode(RGB, "BMP"),
    "bmp_palette": encode(PALETTE, "BMP"),
    "tiff": encode(RGB, "TIFF"),
    "tiff_lzw": encode(RGB, "TIFF", compression="tiff_lzw"),
    "tiff_cmyk": encode(CMYK, "TIFF"),
    "gif": encode(PALETTE, "GIF"),
}


LARGE_JPEG = encode(make_image(6, height=300, width=200))


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_the_reference_decoder(name):
    image = decode(FILES[name])
    assert image.dtype == np.uint8 and image.flags.c_contiguous
    np.testing.assert_array_equal(image, _reference(FILES[name]))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("num_channels, mode", [(1, "L"), (4, "RGBA")])
def test_other_channel_numbers(name, num_channels, mode):
    image = decode(FILES[name], num_channels=num_channels)
    expected = _reference(FILES[name], mode)
    np.testing.assert_array_equal(image, expected)


def test_exif_orientation_is_ignored_as_in_the_reference():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned = decode(encode(RGB, exif=exif))
    np.testing.assert_array_equal(turned, decode(encode(RGB)))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(format):
    deep = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21
    image = decode(encode(Image.fromarray(deep), format))
    np.testing.assert_array_equal(image, np.repeat((deep >> 8)[:, :, None], 3, axis=2))
    assert image.max() == 251
    gray = decode(encode(Image.fromarray(deep), format), num_channels=1)
    np.testing.assert_array_equal(gray[:, :, 0], deep >> 8)


def test_big_endian_16_bits():
    deep = np.array([[0, 255, 256, 65535]], ">u2")
    tiff = encode(Image.frombytes("I;16B", (4, 1), deep.tobytes()), "TIFF")
    assert decode(tiff, num_channels=1).ravel().tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "zero bytes"),
        (b"no image at all, but long enough to look at", "not an image"),
        (FILES["jpeg"][:200], "Truncated"),
        (LARGE_JPEG[: len(LARGE_JPEG) // 2], "truncated"),
        (LARGE_JPEG[:-20], "truncated"),
        (FILES["jpeg_cmyk"][:-200], "truncated"),
        (FILES["png"][: len(FILES["png"]) // 2], "."),
        (FILES["png"][:20], "."),
        (FILES["webp"][: len(FILES["webp"]) // 2], "."),
        (FILES["tiff"][: len(FILES["tiff"]) // 2], "."),
        (FILES["bmp"][:60], "."),
        (b"\xff\xd8\xff\xe0" + bytes(100), "."),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
    ],
)
def test_damaged_files_are_bad_images(content, reason):
    with pytest.raises(BadImage, match=reason):
        decode(content)


@pytest.mark.parametrize("name", ["jpeg", "jpeg_cmyk", "png", "webp", "bmp", "tiff", "gif"])
def test_large_images_are_refused_before_they_are_decoded(name, monkeypatch):
    def fail(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr("simplejpeg.decode_jpeg", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(BadImage, match=r"64 x 48 pixels, above the limit of 3,071"):
        decode(FILES[name], max_pixels=48 * 64 - 1)


def test_the_largest_allowed_size_is_allowed():
    assert decode(FILES["png"], max_pixels=48 * 64).shape == (48, 64, 3)
    assert decode(FILES["jpeg"], max_pixels=48 * 64).shape == (48, 64, 3)


def test_a_jpeg_that_only_warns_is_decoded_as_pillow_does():
    """Bytes between the segments: libjpeg warns, Pillow and the reference go on."""
    content = FILES["jpeg"]
    end_of_header = content.index(b"\xff\xdb")
    odd = content[:end_of_header] + b"\x00\x01\x02" + content[end_of_header:]
    try:
        expected = _reference(odd)
    except OSError:
        with pytest.raises(BadImage):
            decode(odd)
    else:
        np.testing.assert_array_equal(decode(odd), expected)


@pytest.mark.parametrize(
    "array, expected",
    [
        (RGB, RGB),
        (GRAY[:, :, 0], np.repeat(GRAY, 3, axis=2)),
        (GRAY, np.repeat(GRAY, 3, axis=2)),
        (RGBA, RGBA[:, :, :3]),
        (RGB.astype(np.uint16) * 257, RGB),
        (RGB.astype(np.float32) / 255, RGB),
        (GRAY > 100, np.repeat((GRAY > 100) * np.uint8(255), 3, axis=2)),
        (RGB[::-1, ::2], RGB[::-1, ::2]),
    ],
)
def test_arrays(array, expected):
    image = decode(array)
    assert image.dtype == np.uint8 and image.flags.c_contiguous
    np.testing.assert_array_equal(image, expected)


def test_arrays_of_other_channel_numbers():
    many = make_image(0, channels=6)
    np.testing.assert_array_equal(decode(many, num_channels=6), many)
    assert decode(RGB, num_channels=4)[..., 3].min() == 255
    with pytest.raises(BadImage, match="6 channels do not convert to 3"):
        decode(many)
    with pytest.raises(BadImage, match="no 6-channel form"):
        decode(FILES["png"], num_channels=6)


@pytest.mark.parametrize(
    "array, reason",
    [
        (np.full((4, 4, 3), 1.5), r"outside \[0, 1\]"),
        (np.full((4, 4, 3), np.nan), r"outside \[0, 1\]"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (np.zeros((0, 4, 3), np.uint8), "no image"),
        (np.zeros((2, 4, 4, 3), np.uint8), "no image"),
        (np.zeros((3000, 3000), np.uint8), "above the limit"),
    ],
)
def test_arrays_that_are_no_images(array, reason):
    with pytest.raises(BadImage, match=reason):
        decode(array, max_pixels=8_000_000)


@pytest.mark.parametrize(
    "name, format",
    [
        ("jpeg", "JPEG"),
        ("png", "PNG"),
        ("webp", "WEBP"),
        ("bmp", "BMP"),
        ("tiff", "TIFF"),
        ("gif", "GIF"),
    ],
)
def test_formats_by_their_first_bytes(name, format):
    assert image_format(FILES[name][:16]) == format


def test_other_files_have_no_format():
    for header in (b"", b"PK\x03\x04", b"RIFF\x00\x00\x00\x00WAVE", b"hello"):
        assert image_format(header) is None


def test_resizing_is_crop_then_resize():
    """Pillow's `resize(box=...)` would read pixels around the box: the two differ."""
    box = (7, 5, 51, 40)
    image = Image.fromarray(RGB)
    expected = np.asarray(image.crop(box).resize((14, 20), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize_box(to_pillow(RGB), box, 20, 14), expected)
    other = np.asarray(image.resize((14, 20), Image.Resampling.BICUBIC, box=box))
    assert (other != expected).any()


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
def test_channels_resize_alone(channels):
    image = make_image(5, channels=channels)
    resized = resize_box(to_pillow(image), (3, 4, 60, 44), 16, 24)
    assert resized.shape == (16, 24, channels)
    for i in range(channels):
        alone = resize_box(to_pillow(image[:, :, i : i + 1]), (3, 4, 60, 44), 16, 24)
        np.testing.assert_array_equal(resized[:, :, i : i + 1], alone)


@pytest.mark.parametrize("height, width", [(48, 64), (64, 48), (40, 40), (33, 100)])
def test_resize_center_crop_is_torchvisions(height, width):
    image = make_image(4, height=height, width=width)
    resized = resize_center_crop(image, resize=32, crop=28)
    if height <= width:
        size = (int(32 * width / height), 32)
    else:
        size = (32, int(32 * height / width))
    whole = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    top, left = round((size[1] - 28) / 2), round((size[0] - 28) / 2)
    np.testing.assert_array_equal(resized, whole[top : top + 28, left : left + 28])
    assert resized.shape == (28, 28, 3)


def test_a_crop_larger_than_the_image_is_an_error():
    with pytest.raises(ValueError, match="crop=33 must not exceed resize=32"):
        resize_center_crop(RGB, resize=32, crop=33)


def test_a_strip_is_refused_before_its_resize_takes_memory():
    """Short side 1 px to 256: the whole would have 256 x 256 times its pixels."""
    strip = np.zeros((1, 8000, 3), np.uint8)
    for image in (strip, strip.transpose(1, 0, 2)):
        with pytest.raises(
            BadImage, match=r"would become .*2048000.*above the limit of 100,000,000"
        ):
            resize_center_crop(image, resize=256, crop=224)
    assert resize_center_crop(strip[:, :1000], resize=32, crop=28).shape == (28, 28, 3)
