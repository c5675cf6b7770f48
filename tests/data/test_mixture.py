"""Mixtures: numbering, names, shares in words, no labels."""

import numpy as np
import pytest

from dinov2_jax.data.mixture import Mixture
from dinov2_jax.data.records import DataError
from dinov2_jax.data.sources import open_mixture, open_source


def test_records_are_numbered_through(photo_folder):
    mixture = open_mixture(((str(photo_folder), 3), ("photos:left", 1)))
    folder, photos = open_source(str(photo_folder)), open_source("photos:left")
    assert len(mixture) == len(folder) + len(photos) == 43
    assert mixture[23].image == folder[23].image
    assert mixture.name(23) == folder.name(23)
    np.testing.assert_array_equal(mixture[24].image, photos[0].image)
    assert mixture.name(42) == photos.name(18)
    assert mixture.label_names == () and mixture[0].label is None
    assert mixture.describe() == (
        f"mixture of 2 sources: 75.0% {folder.describe()}; 25.0% {photos.describe()}"
    )


def test_rejections_are_gathered(photo_folder):
    (photo_folder / "bad.jpg").write_bytes(b"")
    mixture = open_mixture(((str(photo_folder), 1.0), (str(photo_folder), 1.0)))
    assert [reason for _, reason in mixture.rejected] == ["zero bytes"] * 2


@pytest.mark.parametrize("weights", [[], [1.0, 2.0], [0.0], [-1.0], [float("inf")]])
def test_weights_that_make_no_sense(weights, photo_folder):
    with pytest.raises(DataError, match=r"weights|positive"):
        Mixture([open_source(str(photo_folder))], weights)
