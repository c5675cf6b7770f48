"""Images on their way to the network: at its size, and in batches that keep shards apart."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dinov2_jax.data.image_ops import decode
from dinov2_jax.data.records import BadImage, DataError, Source
from dinov2_jax.features.table import Bad, Row
from dinov2_jax.preprocess import resize


class Image(NamedTuple):
    """An image of the source; without pixels if it is bad."""

    row: Row
    pixels: np.ndarray | None
    reason: str = ""


class Batch(NamedTuple):
    """Images that are computed at once: all of one shard, in order, the bad ones apart."""

    shard: int
    rows: list[Row]
    pixels: list[np.ndarray]
    bad: list[Bad]
    is_last: bool  # of its shard


class Reader:
    """Reads image after image of a source, at the network's size. Safe in threads.

    Attributes:
      image_shape: height, width and channels, the same for every image.
    """

    def __init__(self, source: Source, sizes: Mapping[str, int | None], *, num_channels: int):
        """Binds a source; without a crop the first readable image gives the shape.

        Args:
          source: of the images.
          sizes: of `Model.sizes`.
          num_channels: of the network.

        Raises:
          DataError: no image is readable.
        """
        self._source, self._sizes, self._num_channels = source, sizes, num_channels
        crop = sizes["crop_size_px"]
        self.image_shape, self._first = (crop, crop, num_channels), ""
        if crop is None:
            self.image_shape = None
            found = (self(i) for i in range(len(source)))
            first = next((image for image in found if image.pixels is not None), None)
            if first is None:
                raise DataError(f"none of {source.describe()} can be read; repair them")
            self.image_shape, self._first = first.pixels.shape, first.row.path

    def __call__(self, index: int) -> Image:
        """Image `index` of the source.

        Raises:
          ValueError: it has another size than those before.
        """
        try:
            record = self._source[index]
            pixels = decode(record.image, num_channels=self._num_channels)
            pixels = resize(pixels, **self._sizes)
        except BadImage as error:
            return Image(Row(index, self._source.name(index), None), None, str(error))
        if self.image_shape not in (None, pixels.shape):
            sizes = ["{} x {}".format(*shape[:2]) for shape in (self.image_shape, pixels.shape)]
            raise ValueError(
                f"without a crop all images must end up in one size, but {self._first} is "
                f"{sizes[0]} and {record.name} {sizes[1]} (height x width); crop them, or give "
                "images of each size a target of their own"
            )
        return Image(Row(index, record.name, record.label), pixels)


def shard_range(index: Mapping, shard: int) -> range:
    """The images of a shard."""
    size = index["shard_size"] or index["images"]
    return range(shard * size, min((shard + 1) * size, index["images"]))


def make_batches(
    images: Iterable[Image], lengths: Sequence[tuple[int, int]], *, batch_size: int
) -> Iterator[Batch]:
    """Batches of a stream of images.

    Args:
      images: those of one shard after another.
      lengths: (shard, number of its images), in the order of the stream.
      batch_size: images a batch, at most.

    Yields:
      At least one batch a shard; the last may be without rows.
    """
    images = iter(images)
    for shard, length in lengths:
        while length:
            batch = Batch(shard, [], [], [], False)
            while length and len(batch.rows) < batch_size:
                image = next(images)
                length -= 1
                if image.pixels is None:
                    batch.bad.append((image.row.path, image.reason))
                else:
                    batch.rows.append(image.row)
                    batch.pixels.append(image.pixels)
            yield batch._replace(is_last=length == 0)
