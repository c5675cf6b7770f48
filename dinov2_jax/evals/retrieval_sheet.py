"""What a retrieval finds, as a sheet: a row for each query, right answers framed in green."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import ImageOps

from dinov2_jax.preprocess import read_image
from dinov2_jax.visualize.photos import short_names, spaced_rows
from dinov2_jax.visualize.sheets import (
    INK,
    MARGIN_PX,
    Cell,
    Sheet,
    beside,
    named,
    photo_tile,
)

COLORS = {"right": (40, 160, 70), "wrong": (205, 60, 50), "junk": (170, 170, 170)}
NUM_FOUND = 8  # images of a row
_FRAME_PX = 4


def retrieval_sheet(
    *,
    queries: Sequence[str],
    database: Sequence[str],
    orders: Sequence[np.ndarray],
    positives: Sequence[Sequence[int]],
    junk: Sequence[Sequence[int]],
    notes: Mapping[int, str],
    num_queries: int = 8,
    tile_px: int = 120,
) -> Sheet:
    """Draws evenly spaced queries and what they find first.

    Args:
      queries, database: paths of images, drawn whole.
      orders: of each query, rows of the database, best first; `NUM_FOUND` are drawn.
      positives, junk: rows, of each query.
      notes: stands beside the query's name, by its row.
      num_queries: rows of the sheet, at most.
      tile_px: width of a tile.
    """
    query_names, names = short_names(queries), short_names(database)

    def tile(paths: Sequence[str], row: int, color=None):
        image = photo_tile(read_image(paths[row]), tile_px)
        image = ImageOps.contain(image, (tile_px, 2 * tile_px))
        return image if color is None else ImageOps.expand(image, _FRAME_PX, color)

    cells = []
    for query in spaced_rows(len(queries), num_queries):
        first = named(tile(queries, query), query_names[query], ink=INK)
        note = notes.get(query)
        found = []
        for row in orders[query][:NUM_FOUND].tolist():
            kind = "right" if row in positives[query] else "wrong"
            kind = "junk" if row in junk[query] else kind
            found.append(named(tile(database, row, COLORS[kind]), names[row]))
        cells.append(Cell(beside([first, beside(found)], MARGIN_PX), note or ""))
    headers = [("query", 0), ("most similar first", tile_px + MARGIN_PX)]
    caption = (
        "Green: right. Red: wrong. Grey: junk, which the score passes over. "
        f"{len(cells)} of {len(queries)} queries, evenly spaced."
    )
    return Sheet("Retrieval", caption, cells, headers, width_px=0)
