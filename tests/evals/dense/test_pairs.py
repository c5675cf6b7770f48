"""Finding and reading images with their targets."""

import re

import numpy as np
import pytest
from PIL import Image

from dinov2_jax.data.records import DataError
from dinov2_jax.evals.dense.pairs import folder_pairs, listed_pairs, read_pair, read_target


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


GREY = np.arange(12, dtype=np.uint8).reshape(3, 4)
COLOR = np.repeat(GREY[..., None], 3, axis=-1)


def test_pairs_are_found_by_name_at_any_depth(tmp_path):
    for name in ("b/2_img.png", "a/1_img.png"):
        save(tmp_path / "x" / name, COLOR)
        save(tmp_path / "y" / name.replace("_img", "_mask"), GREY)
    settings = dict(layout="LAYOUT", image_end="_img", target_end="_mask")
    pairs = folder_pairs(tmp_path / "x", tmp_path / "y", **settings)
    assert [pair.name for pair in pairs] == ["1_img", "2_img"]
    assert [pair.target.name for pair in pairs] == ["1_mask.png", "2_mask.png"]


def test_what_has_no_partner_is_an_error(tmp_path):
    save(tmp_path / "x" / "1.png", COLOR)
    save(tmp_path / "x" / "2.png", COLOR)
    save(tmp_path / "y" / "1.png", GREY)
    save(tmp_path / "y" / "3.png", GREY)
    with pytest.raises(DataError, match=r"2 files have no partner .*x/2, .*y/3; expected: LAYOUT"):
        folder_pairs(tmp_path / "x", tmp_path / "y", layout="LAYOUT")
    with pytest.raises(DataError, match=r"z holds no image; expected: LAYOUT"):
        folder_pairs(tmp_path / "x", tmp_path / "z", layout="LAYOUT")
    save(tmp_path / "x" / "1.jpg", COLOR)
    with pytest.raises(DataError, match="have one name; remove one"):
        folder_pairs(tmp_path / "x", tmp_path / "y", layout="LAYOUT")


def test_listed_files_must_be_there(tmp_path):
    save(tmp_path / "1.png", COLOR)
    assert listed_pairs(tmp_path, [("/1.png", "1.png")], layout="L")[0].name == "1"
    with pytest.raises(DataError, match=r"1 listed files are missing, such as .*2.png; expected"):
        listed_pairs(tmp_path, [("1.png", "2.png")], layout="L")
    with pytest.raises(DataError, match="no pair is listed; expected: L"):
        listed_pairs(tmp_path, [], layout="L")


def test_targets_are_read_as_they_are_stored(tmp_path):
    palette = Image.fromarray(GREY, mode=None).convert("P")
    palette.putdata(GREY.ravel())
    palette.putpalette([255 - i for i in range(256) for _ in range(3)])
    palette.save(tmp_path / "palette.png")
    save(tmp_path / "deep.png", GREY.astype(np.uint16) * 5000)
    np.testing.assert_array_equal(read_target(tmp_path / "palette.png"), GREY)
    np.testing.assert_array_equal(read_target(tmp_path / "deep.png"), GREY.astype(int) * 5000)
    save(tmp_path / "color.png", COLOR)
    with pytest.raises(DataError, match=r"color.png holds RGB pixels, and must hold one whole"):
        read_target(tmp_path / "color.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad.png cannot be used: .*; repair it"):
        read_target(tmp_path / "bad.png")


def test_sizes_must_agree(tmp_path):
    save(tmp_path / "x" / "1.png", COLOR)
    save(tmp_path / "y" / "1.png", GREY[:2])
    (pair,) = folder_pairs(tmp_path / "x", tmp_path / "y", layout="L")
    with pytest.raises(DataError, match=re.escape("1.png has 4 x 3 pixels and ")):
        read_pair(pair, read_target)
