"""Images to draw: of any source, whole or cropped, with those that cannot be read named."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dinov2_jax.data.image_ops import decode
from dinov2_jax.data.records import BadImage, Source
from dinov2_jax.data.sources import open_mixture, open_source
from dinov2_jax.features.table import printable


class Photo(NamedTuple):
    """One image as it is drawn and as the network gets it."""

    name: str
    pixels: np.ndarray  # uint8 [height, width, c]


def open_images(paths: Sequence[str]) -> Source:
    """Opens what `data.sources.open_source` opens: one path, or several as one source.

    Raises:
      DataError: nothing usable at one of them.
    """
    return open_source(paths[0]) if len(paths) == 1 else open_mixture([(p, 1.0) for p in paths])


class PhotoReader:
    """Reads photos of a source; what cannot be read is passed over and noted.

    Attributes:
      rejected: (name, reason) of those passed over so far, and of those that the scan rejected.
    """

    def __init__(
        self,
        source: Source,
        *,
        prepare: Callable[[np.ndarray], np.ndarray],
        num_channels: int = 3,
        max_image_pixels: int = 200_000_000,
    ):
        """Binds a source.

        Args:
          source: of photos.
          prepare: from uint8 `[h, w, c]` to the pixels that the network gets, such as
            `data.image_ops.resize_center_crop` with its sizes bound.
          num_channels: 1, 3 or 4.
          max_image_pixels: a larger photo is passed over.
        """
        self.source, self._prepare = source, prepare
        self._reading = {"num_channels": num_channels, "max_pixels": max_image_pixels}
        self.rejected = list(source.rejected)

    def __call__(self, rows: Iterable[int]) -> Iterator[tuple[int, Photo]]:
        """The readable ones of these records, each with its row; names in full."""
        for row in rows:
            name = self.source.name(row)
            try:
                image = self._prepare(decode(self.source[row].image, **self._reading))
            except BadImage as error:
                self.rejected.append((name, str(error)))
                continue
            yield row, Photo(name, image)

    def read(self, rows: Iterable[int]) -> dict[int, Photo]:
        """The readable ones of these records by row, their names as short as tells them apart."""
        photos = dict(self(rows))
        names = short_names([photo.name for photo in photos.values()])
        return {
            row: photo._replace(name=name)
            for (row, photo), name in zip(photos.items(), names, strict=True)
        }

    def sample(self, num_photos: int) -> list[Photo]:
        """At most so many photos, evenly spaced in the source."""
        return list(self.read(spaced_rows(len(self.source), num_photos)).values())


def spaced_rows(num_rows: int, count: int) -> list[int]:
    """`count` of the rows, or all of fewer, evenly spaced from the first."""
    count = min(count, num_rows)
    return (num_rows * np.arange(count) // max(count, 1)).tolist()


def short_names(names: Sequence[str]) -> list[str]:
    """The last parts of paths, as text: as many of each as tell all of them apart."""
    names = [printable(name) for name in names]
    parts = [name.split("/") for name in names]
    for count in range(1, max(map(len, parts), default=0)):
        short = ["/".join(x[-count:]) for x in parts]
        if len(set(short)) == len(set(names)):
            return short
    return names
