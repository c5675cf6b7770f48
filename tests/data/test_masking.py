"""Block masks: the reference's law draw by draw, its statistics, and what always holds."""

import importlib.util
import pathlib
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov2_jax.data import masking
from dinov2_jax.data.masking import BlockMasks, block_mask
from tests.parity import require


def _reference_file(name):
    """A file of the reference's `data` package, whose import would need torchvision."""
    (package,) = require("dinov2").__path__
    path = pathlib.Path(package) / "data" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"reference_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _SameNumbers:
    """Stands in for the reference's module `random`, on our generator's numbers."""

    def __init__(self, rng):
        self._rng, self._numbers = rng, masking._draws(rng)

    def uniform(self, a, b):
        return float(a) + (float(b) - float(a)) * next(self._numbers)

    def randint(self, a, b):
        return a + int(next(self._numbers) * (b - a + 1))

    def shuffle(self, items):
        items[:] = [items[i] for i in self._rng.permutation(len(items))]


def _reference_batch(rows, cols, num_images, numbers, monkeypatch, ratios=(0.1, 0.5)):
    torch = require("torch")
    blocks, collate = _reference_file("masking"), _reference_file("collate")
    for module in (blocks, collate):
        monkeypatch.setattr(module, "random", numbers)
    # As the reference's train.py builds it from the crop size (there square), in its order.
    generator = blocks.MaskingGenerator(
        input_size=(rows, cols), max_num_patches=0.5 * rows * 14 // 14 * cols * 14 // 14
    )
    sample = ({"global_crops": [torch.zeros(1)] * 2, "local_crops": [torch.zeros(1)]}, None)
    batch = collate.collate_data_and_cast(
        [sample] * num_images,
        ratios,
        0.5,
        torch.float32,
        n_tokens=rows * cols,
        mask_generator=generator,
    )
    return {k: v.numpy() if hasattr(v, "numpy") else v for k, v in batch.items()}


@pytest.mark.parity
@pytest.mark.parametrize(
    "rows, cols, num_images, ratios",
    [
        (16, 16, 16, (0.1, 0.5)),
        (14, 14, 12, (0.1, 0.5)),
        (37, 37, 2, (0.1, 0.5)),
        (7, 5, 5, (0.1, 0.5)),
        (12, 20, 4, (0.1, 0.5)),
        (9, 9, 6, (0.6, 0.9)),  # where the limit on a block's size binds
    ],
)
def test_the_same_numbers_give_the_references_masks(rows, cols, num_images, ratios, monkeypatch):
    for seed in range(3):
        numbers = _SameNumbers(np.random.default_rng(seed))
        expected = _reference_batch(rows, cols, num_images, numbers, monkeypatch, ratios)
        sampler = BlockMasks(
            rows=rows,
            cols=cols,
            num_crops=2 * num_images,
            mask_ratio_min=ratios[0],
            mask_ratio_max=ratios[1],
        )
        masks, indices, weights = sampler(np.random.default_rng(seed))
        np.testing.assert_array_equal(masks, expected["collated_masks"])
        num = int(expected["n_masked_patches"].item())
        np.testing.assert_array_equal(indices[:num], expected["mask_indices_list"])
        np.testing.assert_array_equal(weights[:num], expected["masks_weight"])
        # One patch of freedom: the last bit of the reference's float32 edges.
        assert abs(sampler.max_masked_patches - expected["upperbound"]) <= 1


@pytest.mark.parity
def test_mask_statistics_are_the_references(monkeypatch):
    """Its own random numbers: how full masks are, and how often each patch is hidden."""
    rows, num_images = 16, 32
    theirs = np.concatenate(
        [
            _reference_batch(rows, rows, num_images, random.Random(i), monkeypatch)[
                "collated_masks"
            ]
            for i in range(12)
        ]
    )
    sampler = BlockMasks(rows=rows, cols=rows, num_crops=2 * num_images)
    ours = np.concatenate([sampler(np.random.default_rng(i))[0] for i in range(12)])
    assert (ours.any(axis=1)).sum() == (theirs.any(axis=1)).sum() == 12 * num_images
    np.testing.assert_allclose(np.sort(ours.mean(axis=1)), np.sort(theirs.mean(axis=1)), atol=0.02)
    # Hidden more often at the centre than at the corners, alike in both.
    maps = [m.mean(axis=0).reshape(4, 4, 4, 4).mean(axis=(1, 3)) for m in (ours, theirs)]
    np.testing.assert_allclose(maps[0], maps[1], atol=0.03)
    assert maps[0][1:3, 1:3].mean() > maps[0][0, 0] + 0.02


@pytest.mark.parametrize("num_crops, side, size", [(64, 16, 2496), (24, 16, 967), (128, 14, 3771)])
def test_static_size_at_the_references_batch_sizes(num_crops, side, size):
    assert BlockMasks(rows=side, cols=side, num_crops=num_crops).max_masked_patches == size


def test_masks_are_nearly_full_and_never_over_target():
    """Targets spread over the range: the sorted counts follow it closely."""
    rng = np.random.default_rng(0)
    fill = []
    for target in np.repeat(np.arange(25, 129, 8), 20).tolist():
        hidden = block_mask(16, 16, target, masking._draws(rng)).sum()
        assert hidden <= target
        fill.append(hidden / target)
    assert np.mean(fill) > 0.995
    assert np.min(fill) > 0.9


GEOMETRY = {
    "rows": st.integers(1, 20),
    "cols": st.integers(1, 20),
    "num_crops": st.integers(1, 24),
    "mask_probability": st.floats(0, 1),
    "ratios": st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    "seed": st.integers(0, 2**32),
}


@settings(deadline=None, max_examples=150)
@given(**GEOMETRY)
def test_what_always_holds(rows, cols, num_crops, mask_probability, ratios, seed):
    low, high = ratios
    sampler = BlockMasks(
        rows=rows,
        cols=cols,
        num_crops=num_crops,
        mask_probability=mask_probability,
        mask_ratio_min=low,
        mask_ratio_max=high,
    )
    masks, indices, weights = sampler(np.random.default_rng(seed))
    num_patches, size = rows * cols, sampler.max_masked_patches
    assert masks.shape == (num_crops, num_patches) and masks.dtype == bool
    assert indices.shape == weights.shape == (size,)
    assert indices.dtype == np.int32 and weights.dtype == np.float32
    per_crop = masks.sum(axis=1)
    assert (per_crop > 0).sum() <= int(num_crops * mask_probability)
    assert per_crop.max() <= high * num_patches

    is_real = weights > 0
    num_real = is_real.sum()
    assert is_real[:num_real].all() and not indices[num_real:].any()  # padding comes last
    np.testing.assert_array_equal(indices[:num_real], np.flatnonzero(masks))
    # The weights of each masked crop sum to 1.
    sums = np.bincount(indices[is_real] // num_patches, weights[is_real], minlength=num_crops)
    np.testing.assert_allclose(sums, (per_crop > 0).astype(float), rtol=1e-5)

    again = sampler(np.random.default_rng(seed))
    for a, b in zip((masks, indices, weights), again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_masked_crops_are_shuffled():
    """Crop 0 holds every share from none to the most, not always the smallest."""
    sampler = BlockMasks(rows=8, cols=8, num_crops=8)
    counts = [sampler(np.random.default_rng(seed))[0].sum(axis=1) for seed in range(60)]
    first = np.array(counts)[:, 0]
    assert (first == 0).sum() > 10 and first.max() > 24 and 0 < first[first > 0].min() < 16


@pytest.mark.parametrize("settings_", [{"mask_probability": 0.0}, {"mask_probability": 0.1}])
def test_masking_can_be_off(settings_):
    masks, indices, weights = BlockMasks(rows=4, cols=4, num_crops=8, **settings_)(
        np.random.default_rng(0)
    )
    assert not masks.any()
    assert indices.shape == weights.shape == (0,)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"rows": 0}, "must be positive"),
        ({"mask_probability": 1.5}, r"must lie in \[0, 1\]"),
        ({"mask_ratio_min": 0.6}, "the first not above the second"),
        ({"mask_ratio_max": 1.2}, "must be shares"),
    ],
)
def test_settings_that_make_no_sense(wrong, message):
    with pytest.raises(ValueError, match=message):
        BlockMasks(**({"rows": 4, "cols": 4, "num_crops": 8} | wrong))
