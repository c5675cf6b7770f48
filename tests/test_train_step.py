"""The step as a whole: what moves, what must not, what accumulation and guards keep."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax import train_step
from dinov2_jax.objective import LossSettings
from tests import tiny

TERMS = ("total_loss", "dino_global_loss", "dino_local_loss", "ibot_loss", "koleo_loss")


@pytest.fixture(scope="module")
def setup():
    network = tiny.make_network()
    optimizer = tiny.make_optimizer_for(network)
    return network, optimizer, tiny.make_state(network, optimizer)


@pytest.fixture(scope="module")
def compiled(setup):
    network, optimizer, state = setup
    step = jax.jit(tiny.make_step(network, optimizer))
    return step.lower(state, tiny.make_batch(), tiny.HYPER).compile()


@pytest.fixture(scope="module")
def after_one_step(setup, compiled):
    return compiled(setup[2], tiny.make_batch(), tiny.HYPER)


def assert_trees_close(left, right, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), left, right)


def test_teacher_starts_as_the_student(setup):
    state = setup[2]
    assert_trees_close(state.student, state.teacher, rtol=0)


@pytest.mark.parametrize(
    "scope",
    [
        "augment",
        "teacher/VisionTransformer/backbone",
        "teacher/DINOHead",
        "targets/sinkhorn_knopp",
        "student/jvp(VisionTransformer)/backbone",
        "student/transpose(jvp(VisionTransformer))/backbone",
        "student/jvp(DINOHead.bottleneck)",
        "student/transpose(jvp(DINOHead.bottleneck))",
        "student/jvp(prototypes)",
        "optimizer",
        "ema",
    ],
)
def test_profiles_can_name_every_part_of_the_compiled_step(compiled, scope):
    assert f'op_name="jit(train_step)/{scope}/' in compiled.as_text()


def test_teacher_moves_by_the_average_alone(setup, after_one_step):
    state, (new, _) = setup[2], after_one_step
    momentum = tiny.HYPER.teacher_momentum
    expected = jax.tree.map(
        lambda t, s: momentum * t + (1 - momentum) * s, state.teacher, new.student
    )
    assert_trees_close(new.teacher, expected, rtol=1e-6, atol=1e-9)
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), new.student, state.student)
    assert min(jax.tree.leaves(moved)) > 0  # every parameter learns or decays


def test_total_is_the_weighted_sum_of_the_logged_terms(after_one_step):
    metrics = after_one_step[1]
    weights = dict(zip(TERMS[1:], (1.0, 1.0, 1.0, 0.1), strict=True))
    expected = sum(weight * metrics[name] for name, weight in weights.items())
    np.testing.assert_allclose(metrics["total_loss"], expected, rtol=1e-6)


def test_cross_entropies_are_of_the_order_of_log_k_at_the_start(after_one_step):
    metrics = after_one_step[1]
    assert 0.7 < metrics["dino_ce_over_log_k"] < 4.0
    assert 0.7 < metrics["ibot_ce_over_log_k"] < 4.0
    assert 0 < metrics["prototypes_in_use"] <= 1
    assert metrics["nonfinite"] == 0


def test_loss_falls_on_one_batch(setup):
    network, optimizer, state = setup
    step = jax.jit(tiny.make_step(network, optimizer))
    batch, first = tiny.make_batch(), None
    for _ in range(15):
        state, metrics = step(state, batch, tiny.HYPER)
        first = first or metrics
    assert metrics["total_loss"] < first["total_loss"] - 0.1
    assert state.step == 15


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "softmax_center"])
def test_accumulation_gives_the_whole_batch(setup, centering):
    network, optimizer, state = setup
    losses = LossSettings(centering=centering)
    whole, pieces = (
        jax.jit(tiny.make_step(network, optimizer, losses=losses, num_micro_batches=n))(
            state, tiny.make_batch(), tiny.HYPER
        )
        for n in (1, 4)
    )
    assert_trees_close(whole[1], pieces[1], rtol=1e-5, atol=1e-6)
    assert_trees_close(whole[0].centers, pieces[0].centers, rtol=1e-5, atol=1e-7)
    # Adam's first step is lr * sign(grad): compare its first moment, the gradient itself.
    assert_trees_close(whole[0].opt_state.mu, pieces[0].opt_state.mu, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "losses", "num_local"),
    [
        ("dino_only", LossSettings(ibot_weight=0.0), 3),
        ("ibot_only", LossSettings(dino_weight=0.0, koleo_weight=0.0), 3),
        ("no_local_crops", LossSettings(), 0),
        ("koleo_first_crop", LossSettings(koleo_crops="first"), 3),
    ],
)
def test_losses_can_be_left_out(setup, name, losses, num_local):
    network, optimizer, state = setup
    batch = tiny.make_batch(num_local=num_local)
    _, metrics = jax.jit(tiny.make_step(network, optimizer, losses=losses))(
        state, batch, tiny.HYPER
    )
    assert metrics["nonfinite"] == 0
    assert ("ibot_loss" in metrics) == bool(losses.ibot_weight)
    assert ("dino_global_loss" in metrics) == bool(losses.dino_weight)
    if num_local == 0:
        assert metrics["dino_local_loss"] == 0


def test_one_koleo_crop_is_about_half_of_both(setup, after_one_step):
    network, optimizer, state = setup
    losses = LossSettings(koleo_crops="first")
    _, metrics = jax.jit(tiny.make_step(network, optimizer, losses=losses))(
        state, tiny.make_batch(), tiny.HYPER
    )
    ratio = metrics["koleo_loss"] / after_one_step[1]["koleo_loss"]
    assert 0.3 < ratio < 0.7


def test_networks_without_a_head_initialise_and_train():
    for missing in ("ibot_head", "dino_head"):
        network = dataclasses.replace(tiny.make_network(), **{missing: None})
        optimizer = tiny.make_optimizer_for(network)
        losses = LossSettings() if missing == "ibot_head" else LossSettings(dino_weight=0.0)
        state = tiny.make_state(network, optimizer)
        state, metrics = jax.jit(tiny.make_step(network, optimizer, losses=losses))(
            state, tiny.make_batch(), tiny.HYPER
        )
        assert metrics["nonfinite"] == 0
        assert missing not in state.student


def _nan_gradient(loss, student):
    """A loss as finite as before, whose gradient is not: the square root's slope at 0."""
    return loss + jnp.sqrt(0.0 * jnp.sum(student["backbone"]["cls_token"] ** 2))


@pytest.mark.parametrize("where", ["loss", "gradient", "update"])
def test_nonfinite_step_changes_only_the_counters(setup, monkeypatch, where):
    network, optimizer, state = setup
    scale = jnp.nan if where == "loss" else 1.0
    hyper = tiny.HYPER._replace(weight_decay=np.float32(np.nan if where == "update" else 0.1))
    if where == "gradient":
        real = train_step.student_loss

        def student_loss(student, *args, **settings):
            loss, terms = real(student, *args, **settings)
            return _nan_gradient(loss, student), terms

        monkeypatch.setattr(train_step, "student_loss", student_loss)
    step = jax.jit(
        tiny.make_step(
            network,
            optimizer,
            # with softmax centering a skipped step has centers to keep
            losses=LossSettings(centering="softmax_center"),
            augment=lambda crops, parameters: tiny.normalise(crops, parameters) * scale,
        )
    )
    new, metrics = step(state, tiny.make_batch(), hyper)
    assert metrics["nonfinite"] == 1
    assert np.isfinite(metrics["total_loss"]) == (where != "loss")
    assert np.isfinite(metrics["grad_norm/backbone"]) == (where == "update")
    assert new.step == 1
    for name in ("student", "teacher", "opt_state", "centers"):
        assert_trees_close(getattr(new, name), getattr(state, name), rtol=0)


def test_half_precision_computes_in_it_and_keeps_float32(setup, after_one_step):
    network = tiny.make_network(dtype=jnp.bfloat16)
    optimizer, state = setup[1], setup[2]
    gentle = tiny.HYPER._replace(teacher_momentum=np.float32(0.9999))
    new, metrics = jax.jit(tiny.make_step(network, optimizer))(state, tiny.make_batch(), gentle)
    assert {x.dtype for x in jax.tree.leaves((new, metrics))} == {
        np.dtype(np.float32),
        np.dtype(np.int32),
    }
    for name in TERMS:
        np.testing.assert_allclose(metrics[name], after_one_step[1][name], rtol=0.02)
        assert metrics[name] != after_one_step[1][name]
    # The smallest step of the average, which bfloat16 would round away.
    assert_trees_close(
        new.teacher,
        jax.tree.map(lambda t, s: t + 1e-4 * (s - t), state.teacher, new.student),
        rtol=1e-5,
        atol=1e-7,
    )
    kernel = ("backbone", "patch_embed", "proj", "kernel")
    moved = functools.reduce(lambda tree, name: tree[name], kernel, new.teacher)
    before = functools.reduce(lambda tree, name: tree[name], kernel, state.teacher)
    assert np.mean(np.asarray(moved) != np.asarray(before)) > 0.1


@pytest.mark.parametrize(
    ("channels", "backbone"),
    [(3, dict(num_register_tokens=2, ffn="swiglu")), (1, dict(in_channels=1))],
    ids=["registers", "grey"],
)
def test_variants_train(channels, backbone):
    network = tiny.make_network(**backbone)
    shape = (*tiny.IMAGE_SHAPE[:2], channels)
    optimizer = tiny.make_optimizer_for(network, image_shape=shape)
    state = tiny.make_state(network, optimizer, image_shape=shape)
    batch = tiny.make_batch()
    for name in ("global_crops", "local_crops"):
        batch[name] = batch[name][..., :channels]
    new, metrics = jax.jit(tiny.make_step(network, optimizer))(state, batch, tiny.HYPER)
    assert metrics["nonfinite"] == 0
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), new.student, state.student)
    assert min(jax.tree.leaves(moved)) > 0


def test_drop_path_differs_between_steps_and_repeats_with_them():
    network = tiny.make_network(drop_path_rate=0.5)
    optimizer = tiny.make_optimizer_for(network)
    state, batch = tiny.make_state(network, optimizer), tiny.make_batch()
    step = jax.jit(tiny.make_step(network, optimizer))
    frozen = tiny.HYPER._replace(
        learning_rate=np.float32(0), last_layer_learning_rate=np.float32(0)
    )
    losses = []
    for _ in range(2):
        again = state
        for _ in range(2):
            again, metrics = step(again, batch, frozen)
            losses.append(float(metrics["total_loss"]))
    assert losses[:2] == losses[2:] and losses[0] != losses[1]
