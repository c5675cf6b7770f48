"""Features of images whose size a protocol decides: cropped, padded, or as large as they are."""

import dataclasses
import hashlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dinov2_jax.convert.spec import ModelSpec
from dinov2_jax.data.folder import open_files
from dinov2_jax.data.image_ops import decode, resize_whole
from dinov2_jax.data.records import BadImage, DataError, Record, Source
from dinov2_jax.evals.task import Run
from dinov2_jax.preprocess import check_sizes

KINDS = ("crop", "pad", "native")
FEATURES = ("cls", "mean", "cls,mean")
Box = Sequence[float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """How images get their size.

    Attributes:
      kind: "crop": short side to `resize_px`, then the centred square. "pad": larger side to
        `size_px`, then mean colour around it to a square. "native": both sides to the nearest
        multiple of the patch, the larger at most `size_px`.
      size_px: of the square, or of the larger side; None for "native": no limit.
      resize_px: of the short side; for "crop" alone.
    """

    kind: str
    size_px: int | None = None
    resize_px: int | None = None

    def describe(self) -> str:
        """In words, for records and caches."""
        if self.kind == "crop":
            return f"short side {self.resize_px}, cropped to {self.size_px}"
        if self.kind == "pad":
            return f"larger side {self.size_px}, padded to a square"
        return "native sides" + (f", at most {self.size_px}" if self.size_px else "")


class FittedSource(Source):
    """Images of another source at the size of a `Fit`, as arrays."""

    def __init__(
        self,
        source: Source,
        fit: Fit,
        *,
        rows: np.ndarray | None = None,
        boxes: Sequence[Box | None] | None = None,
        mean: Sequence[float],
        patch_size: int,
    ):
        """Binds a source.

        Args:
          source: of the images.
          fit: "pad" or "native"; a crop is what `features.extract` does by itself.
          rows: of the source, in the order wanted; None: all.
          boxes: (left, top, right, bottom) in px, cut out first, for each row of the source.
          mean: of pixels in [0, 1], the colour of padding.
          patch_size: px.
        """
        # What is cached of the images is found by this path.
        digest = f", boxes {hashlib.sha256(repr(boxes).encode()).hexdigest()[:8]}" if boxes else ""
        self.path = f"{source.path}, {fit.describe()}{digest}"
        self.kind, self.rejected = source.kind, source.rejected
        self._source, self._fit, self._boxes = source, fit, boxes
        self._rows = np.arange(len(source)) if rows is None else rows
        self._mean, self._patch_size = mean, patch_size

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return self._source.name(int(self._rows[index]))

    def __getitem__(self, index: int) -> Record:
        row = int(self._rows[index])
        record = self._source[row]
        image = decode(record.image, num_channels=len(self._mean))
        if self._boxes and self._boxes[row] is not None:
            image = cut_box(image, self._boxes[row])
        if self._fit.kind == "pad":
            image = pad_to_square(image, self._fit.size_px, self._mean)
        elif self._fit.kind == "native":
            image = resize_whole(image, *self.native_shape(image.shape[:2]))
        return Record(image, record.name, None)

    def native_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Height and width at whole patches, the larger at most `Fit.size_px`."""
        scale = min(1.0, (self._fit.size_px or max(shape)) / max(shape)) / self._patch_size
        height, width = (max(round(side * scale), 1) * self._patch_size for side in shape)
        return height, width

    def shape(self, index: int) -> tuple[int, int] | None:
        """`native_shape` of an image, which is not decoded; None where it cannot be read."""
        row = int(self._rows[index])
        if self._boxes and self._boxes[row] is not None:
            left, top, right, bottom = (round(x) for x in self._boxes[row])
            return self.native_shape((bottom - top, right - left))
        try:
            image = self._source[row].image
            with Image.open(io.BytesIO(image)) as opened:
                return self.native_shape((opened.height, opened.width))
        except (BadImage, OSError, SyntaxError):
            return None


def cut_box(image: np.ndarray, box: Box) -> np.ndarray:
    """The part of an image in a box, whose sides are rounded to whole px.

    Raises:
      BadImage: the box leaves the image, or is empty.
    """
    left, top, right, bottom = (round(x) for x in box)
    height, width = image.shape[:2]
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise BadImage(f"box {list(box)} does not lie in its {width} x {height} px")
    return image[top:bottom, left:right]


def pad_to_square(image: np.ndarray, size_px: int, mean: Sequence[float]) -> np.ndarray:
    """Larger side to `size_px`, aspect kept, centred on mean colour: `[size, size, c]`."""
    height, width = image.shape[:2]
    scale = size_px / max(height, width)
    image = resize_whole(image, *(max(round(side * scale), 1) for side in (height, width)))
    color = np.round(255 * np.asarray(mean)).astype(np.uint8)
    canvas = np.broadcast_to(color, (size_px, size_px, len(color))).copy()
    top, left = ((size_px - side) // 2 for side in image.shape[:2])
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def open_exactly(names: Sequence[str], *, at: str) -> Source:
    """Image files in the order of a list, none of which may be missing.

    Args:
      names: paths; they may repeat.
      at: what names them.

    Raises:
      DataError: one is missing, or is no image.
    """
    source = open_files(at, list(names))
    if source.rejected:
        name, reason = source.rejected[0]
        raise DataError(
            f"{len(source.rejected)} of {len(names)} images of {at} cannot be used, the first is "
            f"{name}: {reason}; the list and the images must belong together"
        )
    return source


def fitted_features(
    run: Run,
    names: Sequence[str],
    *,
    fit: Fit,
    feature: str = "cls",
    boxes: Sequence[Box | None] | None = None,
    at: str,
) -> np.ndarray:
    """One vector for each image of a list, in its order.

    Args:
      run: of the task.
      names: paths of the images.
      fit: their size.
      feature: among `FEATURES`; of both, each at unit length, one after the other.
      boxes: see `FittedSource`.
      at: what names the images, for messages.

    Returns:
      float32 `[images, d]`.

    Raises:
      DataError: an image cannot be read: rows would no longer be those of the list.
      ValueError: a size that is none.
    """
    source = open_exactly(names, at=at)
    parts = list(_parts(source, fit, boxes=boxes, spec=run.model.spec))
    if fit.kind == "native":
        run.say(f"{at}: {len(names):,} images of {len(parts)} sizes, each compiled once")
    found, is_missing = None, np.ones(len(source), bool)
    for rows, part, sizes in parts:
        features = run.features(part, what=feature, **sizes)
        vectors = _joined([features[name] for name in feature.split(",")])
        if found is None:
            found = np.zeros((len(source), vectors.shape[1]), np.float32)
        rows = rows[features.ids]
        found[rows], is_missing[rows] = vectors, False
    if is_missing.any():
        raise DataError(
            f"{is_missing.sum()} of {len(source)} images of {at} cannot be read, the first is "
            f"{source.name(int(is_missing.argmax()))}; repair them"
        )
    return found


def _parts(
    source: Source, fit: Fit, *, boxes: Sequence[Box | None] | None, spec: ModelSpec
) -> Iterator[tuple[np.ndarray, Source, dict[str, Any]]]:
    """Rows of the source that end up in one size, their images, and sizes for `Run.features`."""
    everything = np.arange(len(source))
    settings = dict(boxes=boxes, mean=spec.mean, patch_size=spec.patch_size)
    fitted = FittedSource(source, fit, **settings)
    if fit.kind == "crop":
        check_sizes(fit.resize_px, fit.size_px)
        sizes = dict(resize_size_px=fit.resize_px, crop_size_px=fit.size_px)
        yield everything, fitted if boxes else source, sizes
    elif fit.kind == "pad":
        yield everything, fitted, dict(resize_size_px=fit.size_px, crop_size_px=fit.size_px)
    else:
        shapes = [fitted.shape(i) for i in range(len(source))]
        for shape in sorted({shape for shape in shapes if shape is not None}):
            rows = np.array([i for i, x in enumerate(shapes) if x == shape])
            sizes = dict(resize_size_px=min(shape), crop=False)
            yield rows, FittedSource(source, fit, rows=rows, **settings), sizes


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Features side by side, each at unit length where there are several."""
    arrays = [np.asarray(x, np.float32) for x in arrays]
    if len(arrays) == 1:
        return arrays[0]
    norms = [np.linalg.norm(x, axis=1, keepdims=True) for x in arrays]
    return np.concatenate([x / np.maximum(n, 1e-12) for x, n in zip(arrays, norms, strict=True)], 1)
