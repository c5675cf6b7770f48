"""Reading and resizing images on the host. Images are uint8 [h, w, c], values 0 to 255.

Behaviour follows dinov2/data/datasets/decoders.py (`Image.open(...).convert("RGB")`): EXIF
orientation is ignored, alpha is dropped, a palette is looked up. Departures: 16-bit images are
scaled to 8 bits (Pillow clips greyscale ones), and every failure is a `BadImage`.
Resampling is Pillow's antialiased bicubic, the reference's.
"""

import io

import numpy as np
import simplejpeg
from PIL import Image

from dinov2_jax.data.records import BadImage

# Sizes are checked against `max_pixels` before anything is decoded. Pillow's own limit would warn
# from 89 million pixels on and cannot be set per call.
Image.MAX_IMAGE_PIXELS = None

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
NUM_SNIFFED_BYTES = 16
# A strip of one pixel's width grows by its length squared when its short side is resized.
MAX_RESIZED_PIXELS = 100_000_000
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"GIF8", "GIF"),
)
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_JPEG_COLORS = {1: "GRAY", 3: "RGB", 4: "RGBA"}


def image_format(header: bytes) -> str | None:
    """Format named by the first `NUM_SNIFFED_BYTES` bytes of a file; None if it is no image."""
    if header[:4] == b"RIFF" and header[8:12] == b"WEBP":
        return "WEBP"
    return next((name for magic, name in _MAGIC if header.startswith(magic)), None)


def decode(
    image: bytes | np.ndarray, *, num_channels: int = 3, max_pixels: int = 200_000_000
) -> np.ndarray:
    """Decodes an encoded image, or converts an array.

    Args:
      image: file content; or an array [h, w] or [h, w, c] of uint8, uint16 (scaled), bool, or
        float in [0, 1].
      num_channels: 1 (grey), 3 (RGB), 4 (RGBA); arrays may have any other number, unconverted.
      max_pixels: height * width above which the image is refused, before it is decoded.

    Returns:
      uint8 [h, w, num_channels], C-contiguous.

    Raises:
      BadImage: unreadable, truncated, empty, too large, or channels that do not convert.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image, num_channels, max_pixels)
    if not image:
        raise BadImage("zero bytes")
    if num_channels not in _MODES:
        raise BadImage(f"an encoded image has no {num_channels}-channel form")
    # Same pixels as Pillow (both are libjpeg-turbo) at two thirds of its time. What it refuses
    # (CMYK, warnings of the decoder) Pillow judges, as in the reference; it also makes grey of
    # colour, as for the other formats.
    if image[:2] == b"\xff\xd8":
        try:
            height, width, colors, _ = simplejpeg.decode_jpeg_header(image)
            _check_size(height, width, max_pixels)
            if colors == "Gray" or (colors in ("YCbCr", "RGB") and num_channels != 1):
                return simplejpeg.decode_jpeg(image, _JPEG_COLORS[num_channels])
        except BadImage:
            raise
        except ValueError:
            pass
    return _decode_with_pillow(image, num_channels, max_pixels)


def _decode_with_pillow(image: bytes, num_channels: int, max_pixels: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(image), formats=_FORMATS) as opened:
            return from_pillow(opened, num_channels=num_channels, max_pixels=max_pixels)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # whatever a decoder raises is the file's fault
        reason = str(error).replace("\n", " ") or type(error).__name__
        if "cannot identify" in reason:
            reason = "not an image"
        raise BadImage(reason[:120]) from error


def from_pillow(
    opened: Image.Image, *, num_channels: int = 3, max_pixels: int = 200_000_000
) -> np.ndarray:
    """Pixels of a Pillow image of any mode; arguments, result and errors as `decode`.

    What Pillow raises while it decodes passes through.
    """
    if num_channels not in _MODES:
        raise BadImage(f"an image of Pillow has no {num_channels}-channel form; pass an array")
    _check_size(opened.height, opened.width, max_pixels)
    if opened.mode.startswith("I;16"):
        return _from_array(np.asarray(opened).astype(np.uint16), num_channels, max_pixels)
    if opened.mode == "P" and isinstance(opened.info.get("transparency"), bytes):
        opened = opened.convert("RGBA")  # the same colours, without Pillow's warning
    converted = np.array(opened.convert(_MODES[num_channels]))
    return converted.reshape(*converted.shape[:2], num_channels)


def _from_array(image: np.ndarray, num_channels: int, max_pixels: int) -> np.ndarray:
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or 0 in image.shape:
        raise BadImage(f"an array of shape {image.shape} is no image")
    height, width, channels = image.shape
    _check_size(height, width, max_pixels)
    if channels != num_channels and not {channels, num_channels} <= _MODES.keys():
        raise BadImage(f"{channels} channels do not convert to {num_channels}")
    if image.dtype == np.uint16:
        image = image >> 8
    elif image.dtype == np.bool_:
        image = image * np.uint8(255)
    elif image.dtype.kind == "f":
        if not (image.min() >= 0 and image.max() <= 1):
            raise BadImage("float values outside [0, 1]")
        image = np.rint(image * 255)
    elif image.dtype != np.uint8:
        raise BadImage(f"arrays of {image.dtype} are not images; use uint8, uint16, bool or float")
    image = np.ascontiguousarray(image, np.uint8)
    if channels == num_channels:
        return image
    pillow = Image.fromarray(image[:, :, 0] if channels == 1 else image)
    converted = np.array(pillow.convert(_MODES[num_channels]))
    return converted.reshape(height, width, num_channels)


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise BadImage(f"{width} x {height} pixels, above the limit of {max_pixels:,}")


def to_pillow(image: np.ndarray) -> list[Image.Image]:
    """Pillow's form of uint8 [h, w, c]: one image for 1, 3 or 4 channels, else one a channel.

    Alpha is resampled premultiplied, as Pillow does.
    """
    channels = image.shape[2]
    if channels == 1:
        return [Image.fromarray(image[:, :, 0])]
    if channels in _MODES:
        return [Image.fromarray(image)]
    return [Image.fromarray(np.ascontiguousarray(image[:, :, i])) for i in range(channels)]


def resize_box(
    planes: list[Image.Image],
    box: tuple[int, int, int, int],
    height: int,
    width: int,
    *,
    is_flipped: bool = False,
) -> np.ndarray:
    """Crops, then resizes to `height` x `width`, then flips left to right if asked to.

    Cropping comes first because `resize(box=...)` also reads pixels around the box, which the
    reference's crop has cut away; measured, the copy costs 5 % of the resize.

    Args:
      planes: of `to_pillow`.
      box: left, top, right, bottom in whole pixels.

    Returns:
      uint8 [height, width, c].
    """
    resized = [
        plane.crop(box).resize((width, height), Image.Resampling.BICUBIC) for plane in planes
    ]
    if is_flipped:  # by Pillow: numpy takes five times as long to copy a reversed axis
        resized = [plane.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for plane in resized]
    if len(resized) > 1:
        return np.stack([np.asarray(plane) for plane in resized], axis=-1)
    return np.asarray(resized[0]).reshape(height, width, -1)


def resize_whole(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes uint8 [h, w, c] to [height, width, c].

    Raises:
      BadImage: more than `MAX_RESIZED_PIXELS` would result; no memory was taken for them.
    """
    old_height, old_width = image.shape[:2]
    if height * width > MAX_RESIZED_PIXELS:
        raise BadImage(
            f"{old_width} x {old_height} pixels would become {width} x {height}, above the limit "
            f"of {MAX_RESIZED_PIXELS:,}; crop it, or lower the size"
        )
    return resize_box(to_pillow(image), (0, 0, old_width, old_height), height, width)


def resize_center_crop(image: np.ndarray, resize: int, crop: int) -> np.ndarray:
    """The evaluations' view: short side to `resize` px, then the centred `crop` x `crop` px.

    Args:
      image: uint8 [h, w, c].

    Returns:
      uint8 [crop, crop, c].

    Raises:
      BadImage: as `resize_whole`.
    """
    if crop > resize:
        raise ValueError(f"{crop=} must not exceed {resize=}; raise the latter")
    short = min(image.shape[:2])
    new_height, new_width = (int(resize * side / short) for side in image.shape[:2])
    resized = resize_whole(image, new_height, new_width)
    top = round((new_height - crop) / 2)
    left = round((new_width - crop) / 2)
    return resized[top : top + crop, left : left + crop]
