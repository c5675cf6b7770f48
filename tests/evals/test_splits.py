"""Where a split lies, in any storage, and whose classes are whose."""

import argparse

import fsspec
import numpy as np
import pytest

from dinov2_jax.data.records import DataError
from dinov2_jax.evals import splits
from dinov2_jax.evals.splits import (
    add_crop_flags,
    check_labels,
    find_split,
    image_sizes,
    labels_like,
    open_split,
)


@pytest.mark.parametrize(
    ("made", "found"),
    [
        ("train", "train"),
        ("train.tar", "train.tar"),
        ("train-000.tar", "train-*.tar"),
        ("train_000.tar", "train_*.tar"),
        ("train.txt", "train.txt"),
        ("train.array_record-00000-of-00002", "train.array_record*"),
    ],
)
def test_storage_of_a_split(tmp_path, made, found):
    (tmp_path / made).touch()
    assert find_split(str(tmp_path), ("train",)) == str(tmp_path / found)


def test_the_first_name_that_is_there(tmp_path):
    (tmp_path / "validation").mkdir()
    (tmp_path / "test").mkdir()
    assert find_split(str(tmp_path), ("val", "test", "validation")).endswith("test")
    tested = splits.tested(argparse.Namespace(split=None))
    assert find_split(str(tmp_path), tested).endswith("validation")  # it is val by another name
    assert find_split("hf:cifar10", ("test", "val")) == "hf:cifar10:test"
    with pytest.raises(ValueError, match=r"holds no split a or b; expected: a folder with train/"):
        find_split(str(tmp_path), ("a", "b"))
    assert find_split(str(tmp_path), ("a", "b"), default="c") == "c"


@pytest.mark.parametrize("made", ["train/cat/a.png", "train-000.tar", "train.tar", "train.txt"])
def test_splits_at_a_url(tmp_path, made):
    url = f"memory://{tmp_path.name}/{made}"
    fsspec.filesystem("memory").pipe(url, b"x")
    for data in (f"memory://{tmp_path.name}", f"memory://{tmp_path.name}/"):
        found = find_split(data, ("training", "train"))
        pattern = "train-*.tar" if "-" in made else made.split("/")[0]
        assert found == f"memory://{tmp_path.name}/{pattern}"
    with pytest.raises(DataError, match=r"memory://\S+ holds no split val; expected"):
        find_split(data, ("val",))


def test_a_store_that_cannot_be_read(monkeypatch):
    def refused(*_, **__):
        raise PermissionError("not yours")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "info", refused)
    with pytest.raises(DataError, match=r"memory://b cannot be read \(PermissionError: not yours"):
        find_split("memory://b", ("train",), default="none")


def test_home_and_sources(colors, monkeypatch):
    monkeypatch.setenv("HOME", str(colors.parent))
    source = open_split(f"~/{colors.name}", ("val",))
    assert source.label_names == ("blue", "green", "red") and len(source) == 12


def test_the_first_split_that_a_hub_has(monkeypatch):
    asked = []

    def open_source(path):
        asked.append(path)
        if not path.endswith(":test"):
            raise DataError(f"{path} cannot be opened: unknown split")
        return path

    monkeypatch.setattr(splits, "open_source", open_source)
    assert open_split("hf:cifar10", ("val", "validation", "test")) == "hf:cifar10:test"
    assert asked == ["hf:cifar10:val", "hf:cifar10:validation", "hf:cifar10:test"]
    with pytest.raises(DataError, match="hf:cifar10:train cannot be opened: unknown split"):
        open_split("hf:cifar10", ("train", "training"))


@pytest.mark.parametrize("bad", [-1, 2, np.nan])
def test_labels_that_are_none(bad):
    """-1 would count as the last class."""
    with pytest.raises(DataError, match=r"1 of 3 labels of test are none, such as .*from 0 to 1: "):
        check_labels(np.array([0, bad, 1]), num_classes=2, at="test")
    check_labels(np.array([0, 1, 1]), num_classes=2, at="test")


def test_labels_are_matched_by_name():
    labels = np.array([0, 1, 1])
    found = labels_like(labels, label_names=("dog", "cat"), of=("ant", "cat", "dog"), at="val")
    np.testing.assert_array_equal(found, [2, 1, 1])
    with pytest.raises(ValueError, match=r"classes \['emu'\] of val are not among the 1 of the"):
        labels_like(labels, label_names=("dog", "emu"), of=("dog",), at="val")


def test_flags():
    parser = argparse.ArgumentParser()
    add_crop_flags(parser)
    assert splits.tested(parser.parse_args([])) == ("val", "validation", "test")
    flags = parser.parse_args(["--split", "dev", "--resize", "64", "--crop", "56"])
    assert splits.tested(flags) == ("dev",) and (flags.resize, flags.crop) == (64, 56)
    index = {"resize_size_px": 64, "crop_size_px": 56, "what": "cls"}
    assert image_sizes(index) == {"resize_size_px": 64, "crop_size_px": 56}
