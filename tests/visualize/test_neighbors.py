"""Neighbours of planted features: the query and its copies are left out, the rest is exact."""

import functools

import numpy as np
import pytest

from dinov2_jax.data.records import Record, Source
from dinov2_jax.features.extractor import Arrays
from dinov2_jax.visualize.neighbors import Embedded, embed, neighbors_of, neighbors_sheet
from dinov2_jax.visualize.photos import Photo, PhotoReader


def embedded(cls, digests=None) -> Embedded:
    cls = np.asarray(cls, np.float32)
    digests = [f"{i}" for i in range(len(cls))] if digests is None else digests
    return Embedded(np.arange(len(cls)), np.array(digests), cls)


def test_neighbours_are_the_most_similar_others():
    rng = np.random.default_rng(0)
    cls = rng.standard_normal((9, 4))
    cls[5] = cls[2]  # equal features, other pixels: a neighbour
    digests = [*"abcdefgha"]  # 8 is a copy of 0
    gallery = embedded(cls, digests)
    queries = Embedded(np.array([0, 2]), np.array(["a", "c"]), gallery.cls[[0, 2]])
    unit = cls / np.linalg.norm(cls, axis=1, keepdims=True)
    found = neighbors_of(queries, gallery, num_neighbors=3)
    for query, pairs, own in zip((0, 2), found, ({0, 8}, {2}), strict=True):
        cosine = unit @ unit[query]
        expected = [int(i) for i in np.argsort(-cosine, kind="stable") if i not in own][:3]
        assert [i for i, _ in pairs] == expected
        np.testing.assert_allclose([s for _, s in pairs], cosine[expected], atol=1e-6)
    assert found[1][0][0] == 5
    # A gallery without the query, and with fewer photos than asked for.
    other = embedded(cls[3:6], ["x", "y", "z"])
    assert [len(pairs) for pairs in neighbors_of(queries, other, num_neighbors=8)] == [3, 3]


def test_what_has_no_neighbours_is_an_error():
    cls = np.eye(3)
    with pytest.raises(ValueError, match="the gallery must hold another photo than the query"):
        neighbors_of(embedded(cls[:1], ["a"]), embedded(cls[[0, 0]], ["a", "a"]), num_neighbors=1)
    with pytest.raises(ValueError, match="the gallery must hold another photo than the query"):
        neighbors_of(embedded(cls[:2], ["a", "b"]), embedded(cls[1:2], ["b"]), num_neighbors=1)
    with pytest.raises(ValueError, match="CLS features must differ"):
        neighbors_of(embedded(np.ones((2, 3))), embedded(np.ones((4, 3))), num_neighbors=1)
    cls[1, 1] = np.nan
    with pytest.raises(ValueError, match="CLS features must be finite, 1 of 4"):
        neighbors_of(embedded(np.eye(3)[:1]), embedded(cls), num_neighbors=1)


class Photos(Source):
    path, kind, rejected = "p", "memory", []

    def __len__(self):
        return 5

    def __getitem__(self, index):
        image = b"broken" if index == 2 else np.full((6, 6, 3), 10 * (index % 4), np.uint8)
        return Record(image, f"{index}", None)


def test_embedded_photos_have_rows_digests_and_features():
    def extract(images) -> Arrays:
        means = np.array([[image.mean(), 1] for image in images], np.float32)
        return {"cls": means}

    reader = PhotoReader(Photos(), prepare=lambda image: image)
    found = embed(extract, reader, [4, 2, 3, 0])
    assert found.rows.tolist() == [4, 3, 0]
    assert found.cls[:, 0].tolist() == [0, 30, 0]
    assert (found.digests[:, None] == found.digests).tolist() == [
        [True, False, True],
        [False, True, False],
        [True, False, True],
    ]
    assert reader.rejected == [("2", "not an image")]


def test_sheet_prints_queries_and_similarities(monkeypatch):
    flat = functools.partial(np.full, (8, 8, 3), dtype=np.uint8)
    names = []
    named = neighbors_sheet.__globals__["named"]

    def spy(image, name, **settings):
        names.append(name)
        return named(image, name, **settings)

    monkeypatch.setitem(neighbors_sheet.__globals__, "named", spy)
    sheet = neighbors_sheet(
        [Photo("q", flat(fill_value=10))],
        [[(Photo("x", flat(fill_value=20)), 0.91234), (Photo("y", flat(fill_value=30)), 0.5)]],
        tile_px=40,
    )
    assert names == ["q", "0.912 x", "0.500 y"]
    drawn = np.asarray(sheet.cells[0].image)[20]
    assert [int(drawn[x, 0]) for x in (20, 40 + 16 + 20, 40 + 16 + 44 + 20)] == [10, 20, 30]
