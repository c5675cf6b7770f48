"""Readers of retrieval sets, and pickles that hold more than data."""

import json
import os
import pickle
import re

import numpy as np
import pytest

from dinov2_jax.data.records import DataError
from dinov2_jax.evals import safe_pickle
from dinov2_jax.evals.retrieval import LEVELS, PLAIN_LEVELS
from dinov2_jax.evals.retrieval_sets import open_retrieval

TRUTH = {
    "imlist": ["a", "b", "c"],
    "qimlist": ["q"],
    "gnd": [{"easy": np.array([0]), "hard": [2], "junk": np.array([], int), "bbx": [1.5, 2, 3, 4]}],
}


class Harmful:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_plain_data_is_read(tmp_path, protocol):
    path = tmp_path / "gnd_x.pkl"
    path.write_bytes(pickle.dumps(TRUTH, protocol=protocol))
    found = safe_pickle.load(path)
    assert found["imlist"] == TRUTH["imlist"]
    np.testing.assert_array_equal(found["gnd"][0]["easy"], [0])


def test_pickles_of_old_numpy_are_read(tmp_path):
    path = tmp_path / "gnd_x.pkl"
    content = pickle.dumps(TRUTH, protocol=2).replace(b"numpy._core", b"numpy.core")
    path.write_bytes(content)
    np.testing.assert_array_equal(safe_pickle.load(path)["gnd"][0]["easy"], [0])


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(["a", "bcd"]),
        np.array([True, False]),
        np.float32(1.5),
        np.zeros((0, 2)),
    ],
)
def test_arrays_become_lists(tmp_path, protocol, array):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps([array], protocol=protocol))
    assert safe_pickle.load(path) == [array.tolist()]


class OfAddresses:
    """An array of objects whose bytes, which are addresses of objects, the file chooses."""

    def __reduce__(self):
        return np.ndarray, ((1,), np.dtype(object), b"\x01" * 8)


@pytest.mark.parametrize("content", [OfAddresses(), np.array([None]), np.zeros(1, [("a", "O")])])
def test_arrays_of_objects_are_refused(tmp_path, content):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=r"x\.pkl cannot be used: it holds an array of (O|V)8"):
        safe_pickle.load(path)


def test_nothing_in_a_pickle_is_run(tmp_path):
    path, harm = tmp_path / "gnd_x.pkl", tmp_path / "harm"
    path.write_bytes(pickle.dumps({"imlist": [Harmful(harm)]}))
    with pytest.raises(DataError, match=r"gnd_x.pkl cannot be used: it asks for \w+\.mkdir"):
        open_retrieval(str(tmp_path))
    assert not harm.exists()
    path.write_bytes(pickle.dumps(TRUTH)[:-20])
    with pytest.raises(DataError, match=r"gnd_x\.pkl cannot be used"):
        open_retrieval(str(tmp_path))


@pytest.mark.parametrize("suffix", ["pkl", "json"])
def test_revisited(tmp_path, suffix):
    truth = dict(TRUTH, gnd=[{k: [int(y) for y in x] for k, x in TRUTH["gnd"][0].items()}])
    path = tmp_path / f"gnd_roxford5k.{suffix}"
    path.write_bytes(pickle.dumps(TRUTH) if suffix == "pkl" else json.dumps(truth).encode())
    found = open_retrieval(str(tmp_path))
    assert found.kind == "revisited" and found.levels == LEVELS
    assert found.database == [str(tmp_path / "jpg" / f"{x}.jpg") for x in "abc"]
    assert found.queries == [str(tmp_path / "jpg" / "q.jpg")]
    assert found.rows(("easy", "hard")) == [[0, 2]] and found.rows(("junk",)) == [[]]
    assert found.boxes[0][1:] == [2, 3, 4]


def test_met(tmp_path):
    folder = tmp_path / "ground_truth"
    folder.mkdir()
    database = [{"path": "MET/1/0.jpg", "id": 1}, {"path": "MET/5/0.jpg", "id": 5}]
    (folder / "MET_database.json").write_text(json.dumps(database))
    queries = [{"path": "test_met/a.jpg", "MET_id": 5}, {"path": "test_other/b.jpg"}]
    (folder / "testset.json").write_text(json.dumps(queries))
    (folder / "valset.json").write_text(json.dumps(queries[:1]))
    found = open_retrieval(str(tmp_path))
    assert found.database == [str(tmp_path / "images" / x["path"]) for x in database]
    assert found.database_labels.tolist() == [1, 5]
    assert found.test_labels.tolist() == [5, -1] and found.val_labels.tolist() == [5]
    with pytest.raises(DataError, match=r"mini_MET_database\.json is not there"):
        open_retrieval(str(tmp_path), mini=True)
    (folder / "valset.json").write_text("[]")
    with pytest.raises(DataError, match=r"valset\.json must name at least one"):
        open_retrieval(str(tmp_path))


def test_amstertime(tmp_path):
    for name in ("old/1.jpg", "old/2.jpg", "new/2.png", "new/1.png", "new/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = open_retrieval(str(tmp_path))
    assert found.levels == PLAIN_LEVELS
    assert found.queries == [str(tmp_path / "old" / x) for x in ("1.jpg", "2.jpg")]
    assert found.database == [str(tmp_path / "new" / x) for x in ("1.png", "2.png")]
    assert found.rows(("positive",)) == [[0], [1]]
    (tmp_path / "new" / "3.png").touch()
    with pytest.raises(DataError, match=r"\['3'\] are in one alone"):
        open_retrieval(str(tmp_path))


def write_list(path, database, queries):
    path.write_text(json.dumps({"database": database, "queries": queries}))
    return str(path)


def test_list(tmp_path):
    path = write_list(
        tmp_path / "list.json",
        ["a", "b", "c"],
        [
            {"image": "q", "positive": ["c", "a"], "junk": ["b"], "box": [0, 0, 2, 2]},
            {"image": "b", "positive": ["a"]},  # in the database: never its own answer
        ],
    )
    found = open_retrieval(path)
    assert found == open_retrieval(str(tmp_path))
    assert found.levels == PLAIN_LEVELS and found.kind == "list"
    assert found.database == [str(tmp_path / x) for x in "abc"]
    assert found.rows(("positive",)) == [[2, 0], [0]]
    assert found.rows(("junk",)) == [[1], [1]]
    assert found.boxes == [[0, 0, 2, 2], None]
    path = write_list(tmp_path / "list.json", ["a", "b"], [{"image": "q", "easy": ["a"]}])
    assert open_retrieval(path).levels == LEVELS
    # A query of the database that finds nothing but itself is no query of the other kind.
    queries = [{"image": "q", "easy": ["a"]}, {"image": "b"}]
    assert open_retrieval(write_list(tmp_path / "list.json", ["a", "b"], queries)).levels == LEVELS


@pytest.mark.parametrize(
    "database, query, message",
    [
        (["a", "a"], {"image": "q"}, "none twice"),
        ([], {"image": "q"}, "at least one image"),
        (["a"], {"image": "q", "positives": ["a"]}, r"found \['image', 'positives'\]"),
        (["a"], {"image": "q", "positive": ["x"]}, r"positive images \['x'\] of query q must be"),
        (["a"], {"image": "q", "positive": ["a"], "junk": ["a"]}, "names an image twice"),
        (["a", "b"], {"image": "q", "positive": ["a"], "hard": ["b"]}, "not both"),
        ([1], {"image": "q"}, "database must be a list of paths"),
        (["a"], "q", "and queries of records"),
        (["a"], {"image": 1}, "image 1 of a query must be a path"),
        (["a"], {"image": "q", "positive": "a"}, "positive of query q must be a list of paths"),
        (["a"], {"image": "q", "junk": [["a"]]}, "junk of query q must be a list of paths"),
        (["a"], {"image": "q", "box": [1, 2, 3]}, r"box \[1, 2, 3\] of query q must be \[left"),
    ],
)
def test_lists_that_are_wrong(tmp_path, database, query, message):
    path = write_list(tmp_path / "list.json", database, [query])
    with pytest.raises(DataError, match=message):
        open_retrieval(path)


def test_a_list_without_queries(tmp_path):
    path = write_list(tmp_path / "list.json", ["a"], [])
    with pytest.raises(DataError, match="queries must have one at least; expected"):
        open_retrieval(path)


def test_what_is_no_set_gets_the_layout(tmp_path):
    with pytest.raises(DataError, match=re.escape("gnd_roxford5k.pkl and jpg/")):
        open_retrieval(str(tmp_path))
    (tmp_path / "list.json").write_text("{")
    with pytest.raises(DataError, match=r"list\.json is not JSON"):
        open_retrieval(str(tmp_path / "list.json"))
    (tmp_path / "list.json").unlink()
    path = write_list(
        tmp_path / "mixed.json",
        ["a", "b"],
        [{"image": "q", "positive": ["a"]}, {"image": "r", "easy": ["a"]}],
    )
    with pytest.raises(DataError, match="all queries have positive images, or all"):
        open_retrieval(path)
    truth = dict(TRUTH, gnd=[{"easy": [3], "hard": [], "junk": []}])
    (tmp_path / "gnd_x.json").write_text(json.dumps(truth))
    with pytest.raises(DataError, match="easy images of q must be numbered from 0 to 2"):
        open_retrieval(str(tmp_path))
    (tmp_path / "gnd_x.json").write_text(json.dumps({"imlist": []}))
    with pytest.raises(DataError, match="must hold imlist, qimlist and gnd"):
        open_retrieval(str(tmp_path))
