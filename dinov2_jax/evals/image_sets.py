"""Labelled images for evaluation: of a labelled source, or crops that know their photo.

Both are iterables of (uint8 image `[height, width, c]`, label), of one image shape, the same at
every pass. Images that cannot be read are left out and counted; `slots` has their places too.
"""

from collections.abc import Iterator

import jax
import numpy as np

from dinov2_jax.augment import augment
from dinov2_jax.data.ahead import map_ahead
from dinov2_jax.data.batch import AUGMENT_COLUMNS
from dinov2_jax.data.image_ops import decode, resize_center_crop
from dinov2_jax.data.multicrop import random_resized_crop
from dinov2_jax.data.records import BadImage, Source

UNREADABLE = -1  # for a label
_DECODED_AHEAD = 128  # images


class FixedImages:
    """Images in memory.

    Attributes:
      what: the set in words.
      bad: reason by name of the photos left out.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, *, what: str, bad: dict[str, str]):
        self._images, self._labels = images, labels
        self.what, self.bad = what, bad

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        return zip(self._images, self._labels.tolist(), strict=True)

    slots = __iter__  # all of them can be read


class LabelledImages:
    """Images of a labelled source, resized and cropped at the centre.

    Attributes:
      what: the set in words.
    """

    def __init__(
        self,
        source: Source,
        *,
        label_names: tuple[str, ...],
        resize_size_px: int,
        crop_size_px: int,
        num_channels: int,
        max_images: int,
        max_image_pixels: int,
        num_threads: int,
        max_cached_mb: float,
    ):
        """Chooses the images; nothing is decoded yet.

        Args:
          source: with labels.
          label_names: the classes that the labels given out count. They may be another source's:
            labels are matched by name.
          resize_size_px: of the short side.
          crop_size_px: of the centred crop.
          num_channels: 1, 3 or 4.
          max_images: at most so many, drawn without replacement, always the same.
          max_image_pixels: a larger image counts as unreadable.
          num_threads: that decode.
          max_cached_mb: decoded images are kept if all of them fit.

        Raises:
          ValueError: the source has fewer than two classes, or some that `label_names` lacks; or
            the crop is larger than the resized image.
        """
        if crop_size_px > resize_size_px:
            raise ValueError(
                f"{crop_size_px=} must not exceed {resize_size_px=}; set eval.resize_size_px"
            )
        names = tuple(source.label_names)
        if len(names) < 2:
            raise ValueError(
                f"kNN needs at least two labelled classes, found {len(names)} in "
                f"{source.describe()}; arrange the images in one folder per class, or set "
                "eval.kind to crop_identity or none"
            )
        unknown = [name for name in names if name not in label_names]
        if unknown:
            raise ValueError(
                f"classes {unknown[:5]} of {source.describe()} are not among the bank's "
                f"{len(label_names)}; take bank and queries from one data set"
            )
        chosen = np.random.default_rng(0).permutation(len(source))[:max_images]
        self._chosen = np.sort(chosen).tolist()
        self._source = source
        self._labels = [label_names.index(name) for name in names]
        self._sizes = {"resize": resize_size_px, "crop": crop_size_px}
        self._reading = {"num_channels": num_channels, "max_pixels": max_image_pixels}
        self._black = np.zeros((crop_size_px, crop_size_px, num_channels), np.uint8)
        self._num_threads = num_threads
        total_mb = len(self._chosen) * crop_size_px**2 * num_channels / 2**20
        self._is_cached = total_mb <= max_cached_mb
        self._cache: dict[int, tuple[np.ndarray, int]] = {}
        self._bad: dict[int, tuple[str, str]] = {}
        self.what = f"images of {len(names)} classes"

    @property
    def bad(self) -> dict[str, str]:
        """Reason by name of the images left out, as far as they have been tried."""
        return dict(self._bad.values())

    def __len__(self) -> int:
        """Images, less those found unreadable so far."""
        return len(self._chosen) - len(self._bad)

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        return (item for item in self.slots() if item[1] != UNREADABLE)

    def slots(self) -> Iterator[tuple[np.ndarray, int]]:
        """Every chosen image; one that cannot be read is black, and its label `UNREADABLE`."""
        return map_ahead(
            self._read, self._chosen, num_threads=self._num_threads, ahead=_DECODED_AHEAD
        )

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        if index in self._bad:
            return self._black, UNREADABLE
        if index in self._cache:
            return self._cache[index]
        try:
            record = self._source[index]
            image = resize_center_crop(decode(record.image, **self._reading), **self._sizes)
        except BadImage as error:
            self._bad[index] = (self._source.name(index), str(error))
            return self._black, UNREADABLE
        item = (image, self._labels[record.label])
        if self._is_cached:
            self._cache[index] = item
        return item


ImageSet = FixedImages | LabelledImages


def identity_crops(
    bank: Source,
    queries: Source,
    *,
    crop_size_px: int,
    crops_per_image: int,
    crop_scale: tuple[float, float],
    aspect_ratio: tuple[float, float],
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    max_images: int,
    num_channels: int,
    max_image_pixels: int,
) -> tuple[FixedImages, FixedImages]:
    """Random crops of both sources, flipped and colour-jittered; the label is the photo.

    A crop depends on its photo's name, its side and its number alone. A photo that either source
    cannot read is left out of both. Arguments: see `in_run.crop_identity`.

    Returns:
      Bank and queries.

    Raises:
      ValueError: the sources do not hold the same photos, or fewer than two.
    """
    reading = {"num_channels": num_channels, "max_pixels": max_image_pixels}
    rows = [{source.name(i): i for i in range(len(source))} for source in (bank, queries)]
    if rows[0].keys() != rows[1].keys():
        unpaired = sorted(rows[0].keys() ^ rows[1].keys())
        raise ValueError(
            f"{bank.describe()} and {queries.describe()} must hold the same photos, but "
            f"{len(unpaired)} are in one only, the first is {unpaired[0]}; use photos:left "
            "and photos:right"
        )
    crops, labels, bad = ([], []), [], {}
    for name in sorted(rows[0])[:max_images]:
        try:
            sides = [
                decode(source[row[name]].image, **reading)
                for source, row in zip((bank, queries), rows, strict=True)
            ]
        except BadImage as error:
            bad[name] = str(error)
            continue
        for side, image in enumerate(sides):
            rng = np.random.default_rng([side, *name.encode()])
            raw = [
                random_resized_crop(
                    image, rng, size_px=crop_size_px, scale=crop_scale, aspect_ratio=aspect_ratio
                )
                for _ in range(crops_per_image)
            ]
            flips = rng.random(crops_per_image) < 0.5
            raw = [crop[:, ::-1] if flip else crop for crop, flip in zip(raw, flips, strict=True)]
            jitter = draw_jitter(rng, crops_per_image, (brightness, contrast, saturation), hue)
            crops[side].append(_jittered(np.stack(raw), jitter))
        labels.append(np.full(crops_per_image, len(labels)))
    if len(labels) < 2:
        raise ValueError(
            f"{bank.describe()} must hold at least two readable photos to tell apart, but has "
            f"{len(labels)}; check eval.bank_path"
        )
    what = f"crops of {len(labels)} photos"
    labels = np.concatenate(labels)
    return (
        FixedImages(np.concatenate(crops[0]), labels, what=what, bad=bad),
        FixedImages(np.concatenate(crops[1]), labels, what=what, bad={}),  # counted once
    )


def draw_jitter(
    rng: np.random.Generator, num_crops: int, strengths: tuple[float, float, float], hue: float
) -> np.ndarray:
    """Parameters `[crops, len(AUGMENT_COLUMNS)]`: every crop is jittered, nothing else."""
    params = np.zeros((num_crops, len(AUGMENT_COLUMNS)), np.float32)
    column = {name: params[:, i] for i, name in enumerate(AUGMENT_COLUMNS)}
    column["jitter"][:] = 1
    for name, strength in zip(("brightness", "contrast", "saturation"), strengths, strict=True):
        column[name][:] = rng.uniform(max(0, 1 - strength), 1 + strength, num_crops)
    column["hue"][:] = rng.uniform(-hue, hue, num_crops)
    column["jitter_order"][:] = rng.integers(0, 24, num_crops)
    return params


@jax.jit
def _jittered(crops: np.ndarray, params: np.ndarray) -> np.ndarray:
    channels = crops.shape[-1]
    pixels = augment(crops, params, mean=(0,) * channels, std=(1,) * channels)
    return jax.numpy.round(255 * pixels).astype(np.uint8)
