"""Layouts of segmentation data sets, and what numbers in masks become."""

import numpy as np
import pytest
from PIL import Image

from dinov2_jax.data.records import DataError
from dinov2_jax.evals.dense.mask_sets import (
    CITYSCAPES_CLASSES,
    IGNORED,
    VOC_CLASSES,
    open_mask_set,
)
from tests.evals.dense.small_sets import save_masks


def save(root, name, pixels):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


COLOR, MASK = np.zeros((2, 3, 3)), np.array([[0, 1, 2], [7, 8, 255]])


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("train", "trainannot"),
        ("images/train", "annotations/train"),
        ("images/train", "labels/train"),
        ("train/images", "train/masks"),
        ("rgb/train", "masks/train"),
    ],
)
def test_plain_layouts(tmp_path, images, masks):
    save(tmp_path, f"{images}/a.png", COLOR)
    save(tmp_path, f"{masks}/a.png", MASK)
    found = open_mask_set(str(tmp_path), ("train",))
    assert (found.layout, len(found), found.ids) == ("plain", 1, (0, 1, 2, 7, 8))
    _, classes = found.read(0)
    np.testing.assert_array_equal(classes, [[0, 1, 2], [3, 4, IGNORED]])
    assert classes.dtype == np.int16


def test_ade20k_has_no_class_zero(tmp_path):
    save(tmp_path, "images/training/a.png", COLOR)
    save(tmp_path, "annotations/training/a.png", [[0, 1, 2], [3, 150, 0]])
    found = open_mask_set(str(tmp_path), ("train",))
    assert (found.layout, len(found.ids), found.ignored) == ("ade20k", 150, (0,))
    np.testing.assert_array_equal(found.read(0)[1], [[IGNORED, 0, 1], [2, 149, IGNORED]])
    (tmp_path / "classes.txt").write_text("\n".join(f"name {i}" for i in range(150)))
    named = open_mask_set(str(tmp_path), ("train",))
    assert named.names[1] == "name 0"
    assert named.names[150] == "name 149"


def test_voc_reads_its_lists(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name in "ab":
        save(root, f"JPEGImages/{name}.jpg", COLOR)
        save(root, f"SegmentationClass/{name}.png", [[0, 20, 255], [1, 2, 3]])
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("b\n")
    found = open_mask_set(str(tmp_path), ("train",))
    assert found.class_names == tuple(VOC_CLASSES)
    assert [pair.name for pair in found.pairs] == ["b"]
    np.testing.assert_array_equal(found.read(0)[1], [[0, 20, IGNORED], [1, 2, 3]])
    with pytest.raises(DataError, match=r"val.txt is missing; expected"):
        open_mask_set(str(tmp_path), ("val",))


@pytest.mark.parametrize("end", ["labelTrainIds", "labelIds"])
def test_cityscapes(tmp_path, end):
    save(tmp_path, "leftImg8bit/val/ulm/ulm_1_leftImg8bit.png", COLOR)
    numbers = [[0, 18, 255], [1, 2, 3]] if end == "labelTrainIds" else [[7, 33, 4], [8, 11, 12]]
    save(tmp_path, f"gtFine/val/ulm/ulm_1_gtFine_{end}.png", numbers)
    save(tmp_path, "gtFine/val/ulm/ulm_1_gtFine_color.png", COLOR)
    found = open_mask_set(str(tmp_path), ("val",))
    assert found.class_names == tuple(CITYSCAPES_CLASSES)
    np.testing.assert_array_equal(found.read(0)[1], [[0, 18, IGNORED], [1, 2, 3]])


def test_classes_of_a_file(tmp_path):
    save_masks(tmp_path)
    (tmp_path / "classes.txt").write_text("0\tred thing\n1\tgreen\n2\tblue\n3\tnothing\n")
    found = open_mask_set(str(tmp_path), ("train",), ignored=(3, 255))
    assert found.class_names == ("red thing", "green", "blue")
    (tmp_path / "names").write_text("a b\nc\nd\n")
    found = open_mask_set(str(tmp_path), ("train",), classes_file=tmp_path / "names")
    assert found.names == {0: "a b", 1: "c", 2: "d"}
    given = open_mask_set(str(tmp_path), ("val",), names={2: "two", 0: "zero", 1: "one"})
    assert given.ids == (2, 0, 1)


def test_errors_say_the_layout(tmp_path):
    with pytest.raises(DataError, match=r"nowhere is not a folder; expected: a folder in one of"):
        open_mask_set(str(tmp_path / "nowhere"), ("train",))
    save_masks(tmp_path)
    with pytest.raises(DataError, match=r"holds no split test or other; expected: .*trainannot"):
        open_mask_set(str(tmp_path), ("test", "other"))
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    found = open_mask_set(str(tmp_path), ("train",))
    with pytest.raises(DataError, match=r"train0.png holds \[2\], and the 2 classes are 0 to 1"):
        found.read(0)
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"has 1 classes besides the ignored \[0, 1, 255\]"):
        open_mask_set(str(tmp_path), ("train",), ignored=(0, 1, 255))
    with pytest.raises(DataError, match=r"none is not there; give a text file"):
        open_mask_set(str(tmp_path), ("train",), classes_file=tmp_path / "none")
