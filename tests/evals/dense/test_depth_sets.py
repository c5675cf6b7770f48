"""Layouts of depth data sets, units, crops and masks."""

import numpy as np
import pytest
from PIL import Image

from dinov2_jax.data.records import DataError
from dinov2_jax.evals.dense.depth_sets import find_layout, judged, kitti_crop, open_depth_set
from tests.evals.dense.small_sets import save_depths


def save(root, name, pixels):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


COLOR = np.zeros((2, 3, 3), np.uint8)
UNITS = np.array([[0, 1000, 2500], [65535, 1, 8]], np.uint16)


def names(dataset):
    return [pair.name for pair in dataset.pairs]


def test_a_folder_without_splits_is_tested_on_its_end(tmp_path):
    save_depths(tmp_path, num_images=8)
    train = open_depth_set(str(tmp_path), "train", layout="plain", holdout=0.25)
    test = open_depth_set(str(tmp_path), "test", layout="plain", holdout=0.25)
    assert names(train) + names(test) == [f"frame{i}" for i in range(8)]
    assert len(test) == 2
    _, depth = test.read(0)
    assert depth.dtype == np.float32
    assert set(np.unique(depth).tolist()) == {0, 1, 2, 3}
    halved = open_depth_set(str(tmp_path), "test", layout="plain", scale=2000).read(0)[1]
    assert halved.max() == 1.5


@pytest.mark.parametrize("pattern", ["{split}/{kind}", "{kind}/{split}"])
def test_plain_splits(tmp_path, pattern):
    for split in ("train", "val"):
        for kind, pixels in (("rgb", COLOR), ("depth", UNITS)):
            save(tmp_path, f"{pattern.format(split=split, kind=kind)}/{split}.png", pixels)
    for split in ("train", "test"):
        found = open_depth_set(str(tmp_path), split, layout="plain")
        assert names(found) == [{"test": "val"}.get(split, split)]


def test_nyu_reads_its_lists_in_millimetres(tmp_path):
    save(tmp_path, "room/rgb_1.png", COLOR)
    save(tmp_path, "room/sync_depth_1.png", UNITS)
    (tmp_path / "nyu_train.txt").write_text("/room/rgb_1.png /room/sync_depth_1.png 518.8\n\n")
    assert find_layout(str(tmp_path)) == "nyu"
    _, depth = open_depth_set(str(tmp_path), "train", layout="nyu").read(0)
    np.testing.assert_allclose(depth, [[0, 1, 2.5], [65.535, 0.001, 0.008]], rtol=1e-6)
    with pytest.raises(DataError, match=r"nyu_test.txt is missing; expected"):
        open_depth_set(str(tmp_path), "test", layout="nyu")
    (tmp_path / "nyu_test.txt").write_text("alone.png\n")
    with pytest.raises(DataError, match=r"has a line 'alone.png', and must have IMAGE DEPTH"):
        open_depth_set(str(tmp_path), "test", layout="nyu")


def test_kitti_is_cut_and_images_without_depth_are_left_out(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (360, 1230, 3), np.uint8)
    units = rng.integers(0, 20_000, (360, 1230)).astype(np.uint16)
    save(tmp_path, "input/a.png", image)
    save(tmp_path, "gt_depth/a.png", units)
    (tmp_path / "kitti_eigen_test.txt").write_text("a.png a.png 721\nb.png None 721\n")
    assert find_layout(str(tmp_path)) == "kitti"
    found = open_depth_set(str(tmp_path), "test", layout="kitti")
    assert len(found) == 1
    cut, depth = found.read(0)
    np.testing.assert_array_equal(cut, image[8:, 7:1223])
    np.testing.assert_allclose(depth, units[8:, 7:1223] / 256)
    with pytest.raises(DataError, match=r"1216 x 352 pixels or more, not 1000 x 400"):
        kitti_crop(np.zeros((400, 1000)))


def test_sun_undoes_the_shift_of_its_camera(tmp_path):
    save(tmp_path, "a.png", COLOR)
    metres = np.array([[1000, 2000, 7999], [0, 12345, 8192]], np.uint16)
    stored = (metres << 3) | (metres >> 13)
    save(tmp_path, "d.png", stored)
    (tmp_path / "SUNRGBD_val_splits.txt").write_text("a.png d.png\n")
    assert find_layout(str(tmp_path)) == "sunrgbd"
    _, depth = open_depth_set(str(tmp_path), "test", layout="sunrgbd").read(0)
    np.testing.assert_allclose(depth, metres / 1000, rtol=1e-6)
    with pytest.raises(DataError, match="sunrgbd has no training split"):
        open_depth_set(str(tmp_path), "train", layout="sunrgbd")


def test_judged_pixels():
    eigen = judged((480, 640), "eigen")
    assert eigen.sum() == (471 - 45) * (601 - 41)
    assert eigen[45, 41] and eigen[470, 600]
    assert not eigen[44, 41] and not eigen[471, 600] and not eigen[45, 601]
    garg = judged((352, 1216), "garg")
    rows, columns = np.flatnonzero(garg.any(axis=1)), np.flatnonzero(garg.any(axis=0))
    assert (rows[0], rows[-1] + 1) == (int(0.40810811 * 352), int(0.99189189 * 352))
    assert (columns[0], columns[-1] + 1) == (int(0.03594771 * 1216), int(0.96405229 * 1216))
    assert judged((3, 4), "all").all()


def test_errors(tmp_path):
    with pytest.raises(DataError, match="is not a folder; expected"):
        open_depth_set(str(tmp_path / "none"), "train", layout="plain")
    with pytest.raises(DataError, match=r"holds no images and depth of a train split; expected"):
        open_depth_set(str(tmp_path), "train", layout="plain")
    save_depths(tmp_path, num_images=1)
    with pytest.raises(DataError, match="holds 1 pairs, of which 1 are held out"):
        open_depth_set(str(tmp_path), "train", layout="plain")
