"""Votes of patches against scikit-learn; the bank's labels, size and memory."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from dinov2_jax.evals.dense import bank as bank_file
from dinov2_jax.evals.dense.bank import (
    build_bank,
    chunked,
    patch_classes,
    patch_maps,
    vote,
    voting_maps,
)
from dinov2_jax.evals.dense.mask_sets import IGNORED
from dinov2_jax.evals.dense.predict import Slide, predict_classes
from tests.evals.dense.models import pixels
from tests.evals.dense.small_sets import COLORS, color_grid

TEMPERATURE = 0.07


def features(seed, labels):
    centers = np.random.default_rng(0).standard_normal((4, 6))
    noise = np.random.default_rng(seed).standard_normal((len(labels), 6))
    return (centers[labels] + noise).astype(np.float32)


@pytest.mark.parametrize("temperature", [None, TEMPERATURE])
def test_shares_are_scikit_learns(temperature, monkeypatch):
    monkeypatch.setattr(bank_file, "_BANK_CHUNK", 30)
    monkeypatch.setattr(bank_file, "_QUERY_CHUNK", 16)
    classes, queries = np.arange(100) % 4, features(2, np.arange(37) % 4)
    known = features(1, classes)
    weights = "uniform" if temperature is None else lambda d: np.exp((1 - d) / temperature)
    oracle = KNeighborsClassifier(9, metric="cosine", weights=weights, algorithm="brute")
    expected = oracle.fit(known, classes).predict_proba(queries)
    bank = chunked(known)
    assert bank.shape == (4, 30, 6)
    settings = dict(num_neighbors=9, num_classes=4, temperature=temperature)
    np.testing.assert_allclose(vote(queries, bank, classes, **settings), expected, atol=1e-5)


def test_a_patch_has_its_commonest_class():
    classes = np.full((5, 6), IGNORED)
    classes[:3, :2], classes[:3, 2] = 2, 1
    # Padded to 8 x 8 around the centre: one row above, two below; one column on each side.
    found = patch_classes(classes, (2, 2), 4, num_classes=3)
    assert found.tolist() == [2, IGNORED, IGNORED, IGNORED]
    assert patch_classes(classes[:, 2:], (2, 1), 4, num_classes=3).tolist() == [1, IGNORED]
    classes[3, 3] = 0  # of the last patch, where the first would end without padding
    assert patch_classes(classes, (2, 2), 4, num_classes=3).tolist() == [2, IGNORED, IGNORED, 0]


def images(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        classes = color_grid(rng)
        yield COLORS[classes], classes.astype(np.int16)


def make_bank(limit, seed=0):
    model = pixels()
    return model, build_bank(
        images(5),
        patch_maps(model, batch_size=4),
        slide=Slide(short_side_px=42, crop_px=42, stride_px=42),
        mean=model.spec.mean,
        std=model.spec.std,
        patch_size=14,
        num_classes=3,
        num_images=5,
        limit=limit,
        seed=seed,
    )


def test_colors_are_found_again():
    model, bank = make_bank(1000)
    assert bank.features.shape == (5 * 2 * 9, 588)  # two windows of 3 x 3 patches each
    settings = dict(num_neighbors=5, num_classes=3, temperature=TEMPERATURE)
    maps = voting_maps(model, bank, **settings, batch_size=4)
    classes = color_grid(np.random.default_rng(7))
    slide = Slide(short_side_px=42, crop_px=42, stride_px=28)
    normal = dict(mean=model.spec.mean, std=model.spec.std)
    found = predict_classes(COLORS[classes], maps, slide, **normal, is_logits=False)
    centers = np.s_[7::14, 7::14]
    np.testing.assert_array_equal(found[centers], classes[centers])


def test_the_bank_is_bounded_and_of_the_seed():
    banks = [make_bank(22, seed)[1] for seed in (0, 0, 1)]
    assert [len(bank.classes) for bank in banks] == [20, 20, 20]  # 22 // 5 of each image
    np.testing.assert_array_equal(banks[0].features, banks[1].features)
    assert (banks[0].features != banks[2].features).any()


def test_nothing_labelled_is_an_error():
    with pytest.raises(ValueError, match="no patch of the training images has a class"):
        build_bank(
            [(np.zeros((14, 14, 3), np.uint8), np.full((14, 14), IGNORED))],
            lambda windows: np.zeros((1, 1, 1, 4)),
            slide=Slide(short_side_px=14, crop_px=14, stride_px=14),
            mean=(0, 0, 0),
            std=(1, 1, 1),
            patch_size=14,
            num_classes=2,
            num_images=1,
            limit=9,
            seed=0,
        )
