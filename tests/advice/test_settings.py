"""How many teacher rows a step has, and whose prototypes they meet."""

import dataclasses

import numpy as np
import pytest

from dinov2_jax.data.masking import BlockMasks
from tests.advice.runs import PAPER, SMALL

DINO, IBOT = "dino.num_prototypes", "ibot.num_prototypes"


def test_the_expected_masked_patches_are_those_that_are_drawn():
    run = dataclasses.replace(PAPER, **SMALL)
    masks = BlockMasks(rows=8, cols=8, num_crops=2 * 64, mask_probability=0.5)
    rng = np.random.default_rng(0)
    drawn = np.mean([masks(rng)[0].sum() for _ in range(10)])
    expected = 64 * 2 * 0.5 * 0.3 * 64
    assert run.rows[IBOT, "masked patches"] == pytest.approx(expected)
    assert drawn == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, {(DINO, "CLS tokens"), (IBOT, "masked patches")}),
        ({"has_separate_head": False}, {(DINO, "CLS tokens"), (DINO, "masked patches")}),
        ({"ibot_weight": 0.0}, {(DINO, "CLS tokens")}),
        ({"dino_weight": 0.0}, {(IBOT, "masked patches")}),
        ({"dino_weight": 0.0, "has_separate_head": False}, {(DINO, "masked patches")}),
    ],
)
def test_rows_meet_the_prototypes_of_the_head_that_serves_them(changes, kinds):
    run = dataclasses.replace(PAPER, ibot_prototypes=7, **changes)
    assert set(run.rows) == kinds
    assert set(run.prototypes.items()) == {(key, 7 if key == IBOT else 131_072) for key, _ in kinds}
    assert run.rows.get((DINO, "CLS tokens"), 6144) == 6144


def test_the_factor_of_the_learning_rate_is_the_rules():
    run = dataclasses.replace(PAPER, global_batch_size=256)
    assert run.learning_rate_factor == 0.5
    assert dataclasses.replace(run, learning_rate_scaling="none").learning_rate_factor == 1
