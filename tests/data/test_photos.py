"""The wheels' photographs: parts that share no pixel, and packages that are missing."""

import importlib.util
import pickle

import numpy as np
import pytest
from PIL import Image

from dinov2_jax.data.image_ops import decode
from dinov2_jax.data.records import DataError
from dinov2_jax.data.sources import open_source


def test_about_twenty_photographs_of_one_name_each():
    source = open_source("photos:")
    assert len(source) == len(set(source.label_names)) == 19
    assert source.rejected == []
    names = " ".join(source.label_names)
    for subject in ("chelsea", "coffee", "astronaut", "retina", "brick", "ihc", "motorcycle_left"):
        assert subject in names
    for other in ("motorcycle_right", "logo", "text", "page", "chessboard", "horse", "phantom"):
        assert other not in names


def test_parts_share_no_pixel_and_keep_the_label():
    whole, left, right = (open_source(f"photos:{part}") for part in ("", "left", "right"))
    assert whole.label_names == left.label_names == right.label_names
    for i in (0, 4, 16):  # colour, odd width, JPEG
        parts = [source[i] for source in (whole, left, right)]
        assert [part.label for part in parts] == [i] * 3
        a, b, c = (decode(part.image) for part in parts)
        np.testing.assert_array_equal(a, np.concatenate([b, c], axis=1))
        assert b.shape[1] == a.shape[1] * 3 // 4


def test_large_photographs_are_scaled_down_after_the_cut():
    """Each part alone: the columns beside the cut hold nothing of the other part."""
    whole, left, right = (open_source(f"photos:{part}") for part in ("", "left", "right"))
    shapes = [whole[i].image.shape for i in range(len(whole))]
    assert max(max(shape) for shape in shapes) == 640
    i = whole.label_names.index("retina.jpg")  # 1411 x 1411 px
    assert whole[i].image.shape == (640, 640, 3)
    assert left[i].image.shape == (640, 480, 3)
    assert right[i].image.shape == (640, 160, 3)
    with open(left._files[i], "rb") as file:
        pixels = decode(file.read())[:, : 1411 * 3 // 4]
    alone = Image.fromarray(pixels).resize((480, 640), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(left[i].image, np.asarray(alone))


def test_photographs_are_decoded_once():
    source = open_source("photos:left")
    assert source[3].image is source[3].image
    copied = pickle.loads(pickle.dumps(source))
    assert copied._decoded == {}
    np.testing.assert_array_equal(copied[3].image, source[3].image)


def test_other_parts_are_an_error():
    with pytest.raises(DataError, match=r"photos:top must be one of .*photos:left"):
        open_source("photos:top")


def test_a_missing_package_names_the_pip_line(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sklearn" else find_spec(name)
    )
    with pytest.raises(DataError, match=r"needs the package sklearn: pip install .*quickstart"):
        open_source("photos:")
