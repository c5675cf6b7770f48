"""The training: the same bits whether interrupted or not, every image in turn, clear errors."""

import itertools
import signal

import jax
import numpy as np
import pytest

from dinov2_jax.convert.safetensors_file import read_safetensors
from dinov2_jax.evals.dense.devices import Devices
from dinov2_jax.evals.dense.heads import segmentation_head
from dinov2_jax.evals.dense.losses import cross_entropy
from dinov2_jax.evals.dense.schedules import HeadSchedule
from dinov2_jax.evals.dense.train import Training, image_numbers, train_head, view_rng
from dinov2_jax.models.vit import BackboneOutput
from tests.evals.dense.models import tiny

STEPS, GRID = 7, (2, 2)


def loss(maps, targets, step):
    return cross_entropy(maps, targets)


class Killed(Exception):
    pass


def make_batches(start, *, stop_at=None, bad_at=None, kill_at=None):
    for step in itertools.count(start):
        if step == kill_at:
            raise Killed
        if step == stop_at:
            signal.raise_signal(signal.SIGINT)
        rng = np.random.default_rng(step)
        patches = rng.standard_normal((8, 4, 16)).astype(np.float32)
        if step == bad_at:
            patches[0] = np.nan
        output = BackboneOutput(cls=patches[:, 0], registers=patches[:, :0], patches=patches)
        yield [output], rng.integers(0, 3, (8, 6, 6)).astype(np.int16)


@pytest.fixture(scope="module")
def head():
    model = tiny()
    head = segmentation_head(model, "linear", 3)
    return head, head.init(jax.random.key(0), model.spec.embed_dim)


def train(head, file, *, save_steps=100, request=None, **batches):
    training = Training(
        schedule=HeadSchedule(
            decay="poly", peak=0.05, total_steps=STEPS, warmup_steps=2, warmup_ratio=1e-6
        ),
        weight_decay=0.01,
        clip_norm=None,
        loss=loss,
        save_steps=save_steps,
    )
    return train_head(
        head[0].module,
        head[1],
        lambda start: make_batches(start, **batches),
        grid=GRID,
        training=training,
        file=file,
        request=request or {"seed": 0},
        devices=Devices(),
        is_shown=False,
    )


def assert_equal(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_an_interrupted_training_ends_in_the_same_bits(head, tmp_path):
    whole = train(head, tmp_path / "whole.safetensors")
    file = tmp_path / "cut.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(head, file, stop_at=3)
    assert file.exists()
    assert_equal(train(head, file), whole)
    # What is done is not done again: batches would now be bad.
    assert_equal(train(head, file, bad_at=0), whole)


def test_a_killed_training_goes_on_from_what_was_saved(head, tmp_path):
    whole = train(head, tmp_path / "whole.safetensors")
    file = tmp_path / "killed.safetensors"
    with pytest.raises(Killed):
        train(head, file, save_steps=2, kill_at=5)
    assert int(read_safetensors(file)[1]["step"]) == 4
    assert_equal(train(head, file), whole)


def test_another_request_is_refused(head, tmp_path):
    train(head, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"another request \(seed: 0 -> 1\); choose another --out"):
        train(head, tmp_path / "x.safetensors", request={"seed": 1})


def test_a_loss_that_is_not_finite_stops_and_is_not_saved(head, tmp_path):
    with pytest.raises(ValueError, match=r"loss=nan must be finite, after 4 steps; lower"):
        train(head, tmp_path / "x.safetensors", bad_at=3, save_steps=4)
    assert not (tmp_path / "x.safetensors").exists()


def test_every_image_comes_in_turn_and_in_a_new_order():
    numbers = [
        number
        for step in range(10)
        for number in image_numbers(step, batch_size=3, num_images=5, seed=0)
    ]
    epochs = [numbers[i : i + 5] for i in range(0, 30, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3
    assert image_numbers(4, batch_size=3, num_images=5, seed=0) == numbers[12:15]
    assert image_numbers(4, batch_size=3, num_images=5, seed=1) != numbers[12:15]


def test_views_differ_by_place_and_seed():
    draws = {view_rng(place, seed=seed).random() for place in range(4) for seed in range(3)}
    assert len(draws) == 12
    assert view_rng(3, seed=1).random() == view_rng(3, seed=1).random()
