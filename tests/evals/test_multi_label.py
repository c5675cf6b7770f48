"""Images with several classes: JSON lists and VOC's lists."""

import json

import numpy as np
import pytest

from dinov2_jax.evals.feature_cache import cached_features
from dinov2_jax.evals.multi_label import check_targets, is_multi_label, read_multi_labels
from tests.evals.conftest import write_images


def write_json(root, split, labels):
    (root / f"{split}.json").write_text(json.dumps(labels))


@pytest.fixture
def root(tmp_path):
    write_images(tmp_path / "images", count=2, seed=0)
    write_json(tmp_path, "train", {"images/red/0.png": ["b", "?a"], "images/blue/1.png": ["c"]})
    write_json(tmp_path, "test", {"images/green/0.png": ["a"], "images/red/1.png": []})
    return tmp_path


def test_json(root):
    assert is_multi_label(str(root)) and not is_multi_label(str(root / "images"))
    train = read_multi_labels(str(root), ("train",))
    assert train.names == ("a", "b", "c")
    np.testing.assert_array_equal(train.targets, [[-1, 1, 0], [0, 0, 1]])
    assert read_multi_labels(str(root), ("val",)) is None
    assert read_multi_labels(str(root), ("val", "test")).at.endswith("test.json")


def test_rows_follow_the_features_not_the_file(root, model):
    labels = read_multi_labels(str(root), ("test",))
    (root / "images/green/0.png").unlink()  # left out of the source: rows move up
    features = cached_features(model, labels.source(), root / "cache", quiet=True)
    assert len(features) == 1
    np.testing.assert_array_equal(labels.rows(features, names=("c", "a", "b")), [[0, 0, 0]])
    labels = read_multi_labels(str(root), ("train",))
    features = cached_features(model, labels.source(), root / "cache", quiet=True)
    found = labels.rows(features, names=("c", "a", "b", "d"))
    np.testing.assert_array_equal(found, [[0, -1, 1, 0], [1, 0, 0, 0]])
    with pytest.raises(ValueError, match=r"classes \['c'\] of .*train.json are not among those"):
        labels.rows(features, names=("a", "b"))


def test_voc(tmp_path):
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "cat_train.txt").write_text("000005  1\n000007 -1\n000009  0\n")
    (lists / "dog_train.txt").write_text("000005 -1\n000007  1\n000009 -1\n")
    (lists / "train.txt").write_text("000005\n000007\n")
    assert is_multi_label(str(tmp_path))
    found = read_multi_labels(str(tmp_path), ("train",))
    assert found.names == ("cat", "dog")
    np.testing.assert_array_equal(found.targets, [[1, 0], [0, 1], [-1, 0]])
    assert found.paths[0] == str(tmp_path / "JPEGImages" / "000005.jpg")
    (lists / "dog_train.txt").write_text("000005 -1\n000007  2\n")
    with pytest.raises(
        ValueError, match=r"dog_train.txt:2: '000007  2' must be an image and 1, -1"
    ):
        read_multi_labels(str(tmp_path), ("train",))


@pytest.mark.parametrize("text", ["[1, 2]", "{", '{"a.png": 3}', '{"a.png": "cat"}'])
def test_a_file_of_another_kind(tmp_path, text):
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(ValueError, match=r"train.json cannot be used .*expected: for several"):
        read_multi_labels(str(tmp_path), ("train",))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [1, 0, 1]}, "of two or more classes, found 1; expected: for several classes"),
        ({}, "of two or more classes, found 0; expected: "),
        ({"a": [1, 0, 1], "all": [1, 1, -1], "no": [0, -1, 0]}, r"\['all', 'no'\] are not; add"),
    ],
)
def test_classes_that_cannot_be_learnt(columns, message):
    targets = np.array(list(columns.values()), np.int8).reshape(len(columns), 3).T
    with pytest.raises(ValueError, match=f"^train.json.*{message}"):
        check_targets(targets, names=tuple(columns), at="train.json")
    check_targets(np.eye(2, dtype=np.int8), names=("a", "b"), at="train.json")
