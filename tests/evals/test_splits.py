"""Where a split lies, in any storage, and whose classes are whose."""

import argparse

import numpy as np
import pytest

from dinov2_jax.evals import splits
from dinov2_jax.evals.splits import (
    add_crop_flags,
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
    assert find_split("hf:cifar10", ("test", "val")) == "hf:cifar10:test"
    with pytest.raises(ValueError, match=r"holds no split a or b; expected: a folder with train/"):
        find_split(str(tmp_path), ("a", "b"))


def test_home_and_sources(colors, monkeypatch):
    monkeypatch.setenv("HOME", str(colors.parent))
    source = open_split(f"~/{colors.name}", ("val",))
    assert source.label_names == ("blue", "green", "red") and len(source) == 12


def test_labels_are_matched_by_name():
    labels = np.array([0, 1, 1])
    found = labels_like(labels, label_names=("dog", "cat"), of=("ant", "cat", "dog"), at="val")
    np.testing.assert_array_equal(found, [2, 1, 1])
    with pytest.raises(ValueError, match=r"classes \['emu'\] of val are not among the 1 of the"):
        labels_like(labels, label_names=("dog", "emu"), of=("dog",), at="val")


def test_flags():
    parser = argparse.ArgumentParser()
    add_crop_flags(parser)
    assert splits.tested(parser.parse_args([])) == ("val", "test", "validation")
    flags = parser.parse_args(["--split", "dev", "--resize", "64", "--crop", "56"])
    assert splits.tested(flags) == ("dev",) and (flags.resize, flags.crop) == (64, 56)
    index = {"resize_size_px": 64, "crop_size_px": 56, "what": "cls"}
    assert image_sizes(index) == {"resize_size_px": 64, "crop_size_px": 56}
