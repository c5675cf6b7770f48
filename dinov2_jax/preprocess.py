"""Images of any kind become what a network takes: resized, cropped, normalised float32.

In: paths, encoded bytes, Pillow images or arrays. Out: `[b, height, width, c]`. The pixels are
those of the reference's evaluations (`data.image_ops`); numpy and Pillow only.
"""

import os
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from dinov2_jax.data.image_ops import decode, from_pillow, resize_center_crop, resize_whole
from dinov2_jax.data.records import BadImage

ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray


def preprocess(
    images: ImageLike | Sequence[ImageLike],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    resize_size_px: int,
    crop_size_px: int | None,
    patch_size: int,
) -> np.ndarray:
    """Prepares one image, or several of one resulting size, for a network.

    Args:
      images: a path, the bytes of a file, a Pillow image, or an array `[height, width, c]` or
        `[height, width]` of uint8, uint16, bool, or float in [0, 1]; or a list of any of these,
        or an array `[b, height, width, c]`. EXIF orientation is ignored, as in the reference.
      mean: of pixels in [0, 1], one per channel; their number is that of the channels.
      std: likewise.
      resize_size_px: of the short side (antialiased bicubic).
      crop_size_px: side of the centred crop; None: no crop, each side goes to the nearest
        multiple of the patch.
      patch_size: px.

    Returns:
      float32 `[b, height, width, c]`; b is 1 for a single image.

    Raises:
      ValueError: an image that cannot be read (the message names it), none at all, images of
        different resulting sizes, or a crop larger than the short side.
    """
    is_single = not isinstance(images, (list, tuple)) and getattr(images, "ndim", 3) < 4
    images = [images] if is_single else list(images)
    if not images:
        raise ValueError("there must be at least one image; the list is empty")
    check_sizes(resize_size_px, crop_size_px)
    pixels = []
    for image in images:
        image = read_image(image, num_channels=len(mean))
        pixels.append(resize(image, resize_size_px, crop_size_px, patch_size))
    sizes = sorted({image.shape[:2] for image in pixels})
    if len(sizes) > 1:
        raise ValueError(
            f"images of one batch must have one size, these have {sizes[:3]} (height, width); "
            "set crop_size_px, or pass them one by one"
        )
    scaled = np.stack(pixels).astype(np.float32) / 255
    return (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def check_sizes(resize_size_px: int, crop_size_px: int | None) -> None:
    """Raises ValueError where a size is no size, or a crop is larger than the short side."""
    for name, size in {"resize_size_px": resize_size_px, "crop_size_px": crop_size_px}.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}={size} must be at least 1; leave it out for the model's own")
    if crop_size_px is not None and crop_size_px > resize_size_px:
        raise ValueError(
            f"{crop_size_px=} must not exceed {resize_size_px=}, the short side; raise the latter, "
            "or set crop_size_px=None for no crop"
        )


def read_image(image: ImageLike, *, num_channels: int = 3) -> np.ndarray:
    """Reads one image as uint8 `[height, width, c]`; arguments and errors as `preprocess`."""
    name = "the image"
    try:
        if isinstance(image, Image.Image):
            return _from_opened(image, num_channels)
        if isinstance(image, (str, os.PathLike)):
            name = os.fspath(image)
            with open(image, "rb") as file:
                image = file.read()
        if isinstance(image, Iterator):
            raise BadImage("it is an iterator; pass list(images)")
        if not isinstance(image, bytes):
            image = np.asarray(image)
        return decode(image, num_channels=num_channels)
    except BadImage as error:
        raise ValueError(f"{name} cannot be used: {error}") from error


def _from_opened(image: Image.Image, num_channels: int) -> np.ndarray:
    """A file that Pillow has only opened is decoded here, and may be damaged."""
    try:
        return from_pillow(image, num_channels=num_channels)
    except (OSError, SyntaxError) as error:
        raise BadImage(str(error)) from error


def resize(
    image: np.ndarray, resize_size_px: int, crop_size_px: int | None, patch_size: int
) -> np.ndarray:
    """One image at the network's size, not yet normalised; arguments as `preprocess`.

    Args:
      image: uint8 `[height, width, c]`.

    Returns:
      uint8, cropped; or without a crop as `resize_to_patches`.
    """
    if crop_size_px is not None:
        return resize_center_crop(image, resize_size_px, crop_size_px)
    return resize_to_patches(image, resize_size_px, patch_size)


def resize_to_patches(image: np.ndarray, short_side_px: int, patch_size: int) -> np.ndarray:
    """Short side to `short_side_px`, then both sides to the nearest multiple of the patch.

    Args:
      image: uint8 `[height, width, c]`.

    Returns:
      uint8, with a change of aspect of at most half a patch a side.

    Raises:
      BadImage: as `data.image_ops.resize_whole`.
    """
    sides = image.shape[:2]
    scale = short_side_px / min(sides) / patch_size
    return resize_whole(image, *(max(round(side * scale), 1) * patch_size for side in sides))
