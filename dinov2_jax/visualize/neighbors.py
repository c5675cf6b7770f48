"""Images most like a query, by the CLS token, as a sheet of a row per query."""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dinov2_jax.features.extractor import Arrays
from dinov2_jax.neighbors import nearest_neighbors
from dinov2_jax.visualize.patches import check_features
from dinov2_jax.visualize.photos import Photo, PhotoReader
from dinov2_jax.visualize.sheets import INK, MARGIN_PX, Cell, Sheet, beside, named, photo_tile


class Embedded(NamedTuple):
    """Photos that could be read: one row each."""

    rows: np.ndarray  # int [photos]: in the source
    digests: np.ndarray  # [photos]: of the pixels; equal ones are one photo
    cls: np.ndarray  # float32 [photos, d]


def embed(
    extract: Callable[[Iterable[np.ndarray]], Arrays], reader: PhotoReader, rows: Iterable[int]
) -> Embedded:
    """CLS tokens of photos, which pass through memory batch by batch.

    Args:
      extract: from uint8 pixels to features, such as a `FeatureExtractor` with its parameters.
      reader: whose photos are all of one size.
      rows: of its source.

    Returns:
      One row per photo that could be read; without any, no row.
    """
    kept, digests = [], []

    def pixels() -> Iterator[np.ndarray]:
        for row, photo in reader(rows):
            kept.append(row)
            digests.append(hashlib.sha256(photo.pixels.tobytes()).hexdigest())
            yield photo.pixels

    photos = pixels()
    first = next(photos, None)
    if first is None:
        return Embedded(np.zeros(0, int), np.zeros(0, str), np.zeros((0, 0), np.float32))
    cls = extract(itertools.chain([first], photos))["cls"]
    return Embedded(np.array(kept), np.array(digests), cls)


def neighbors_of(
    queries: Embedded, gallery: Embedded, *, num_neighbors: int
) -> list[list[tuple[int, float]]]:
    """The photos of the gallery most similar to each query, which is itself left out.

    Args:
      queries: of `embed`.
      gallery: likewise, with the same model.
      num_neighbors: at most; fewer where the gallery has no more.

    Returns:
      (position in the gallery, cosine similarity) of each neighbour, best first, for each query.
      Photos with the very pixels of the query are the query.

    Raises:
      ValueError: features that are not finite or all equal, or a gallery of the query alone.
    """
    is_self = queries.digests[:, None] == gallery.digests[None]
    if is_self.all(axis=1).any():
        raise ValueError(
            "the gallery must hold another photo than the query; it holds the query alone"
        )
    check_features(np.concatenate([queries.cls, gallery.cls]), "CLS features")
    k = min(num_neighbors + int(is_self.sum(axis=1).max()), len(gallery.rows))
    found = []
    for i, (similarities, positions) in enumerate(
        zip(*nearest_neighbors(queries.cls, gallery.cls, k=k), strict=True)
    ):
        pairs = zip(positions.tolist(), similarities.tolist(), strict=True)
        found.append([pair for pair in pairs if not is_self[i, pair[0]]][:num_neighbors])
    return found


def neighbors_sheet(
    queries: Sequence[Photo],
    neighbors: Sequence[Sequence[tuple[Photo, float]]],
    *,
    tile_px: int = 160,
) -> Sheet:
    """Draws each query, then its neighbours with their similarities.

    Args:
      queries: as the network saw them.
      neighbors: (photo, cosine similarity) of those of each query, best first.
      tile_px: width of a tile.
    """
    cells = []
    for query, found in zip(queries, neighbors, strict=True):
        first = named(photo_tile(query.pixels, tile_px), query.name, ink=INK)
        others = [
            named(photo_tile(photo.pixels, tile_px), f"{similarity:.3f} {photo.name}")
            for photo, similarity in found
        ]
        cells.append(Cell(beside([first, beside(others)], MARGIN_PX)))
    headers = [("query", 0), ("most similar first", tile_px + MARGIN_PX)]
    caption = (
        "Photos as the network saw them; numbers are cosine similarities of CLS tokens. The query "
        "itself, and exact copies of it, are left out."
    )
    return Sheet("Nearest neighbours", caption, cells, headers, width_px=0)
