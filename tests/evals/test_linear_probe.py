"""The grid against PyTorch's layers, optimizer and schedule, and what each classifier sees."""

import jax
import numpy as np
import pytest

from dinov2_jax.evals.linear_probe import (
    LEARNING_RATES,
    Columns,
    Variant,
    init_probe,
    is_finite,
    learning_rates,
    predict_grid,
    train_steps,
)
from tests.parity import require

COLUMNS = Columns(num_layers=4, cls_dim=5, mean_dim=3)
VARIANTS = tuple(Variant(n, has_mean) for n in (1, 4) for has_mean in (False, True))
RATES = (0.01, 0.1, 0.5)
CLASSES, BATCH, STEPS = 4, 6, 9


def make_batches(steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((steps, BATCH, COLUMNS.width)).astype(np.float32)
    return features, rng.integers(0, CLASSES, (steps, BATCH)).astype(np.int32)


def make_state():
    return init_probe(
        jax.random.key(0), VARIANTS, columns=COLUMNS, num_rates=len(RATES), num_classes=CLASSES
    )


def train(state, features, labels, *, total_steps=STEPS, rates=RATES):
    rates = np.array(rates, np.float32)
    settings = dict(variants=VARIANTS, columns=COLUMNS, total_steps=total_steps)
    return train_steps(state, features, labels, rates, **settings)


def test_columns_are_the_references_concatenation():
    """Class tokens of the last n layers, oldest first, then the mean patch."""
    cls = [np.full(5, layer) for layer in range(4)]
    features = np.concatenate([*cls, np.full(3, 9)])
    assert COLUMNS.width == len(features)
    for variant in VARIANTS:
        mean = [features[-3:]] if variant.has_mean else []
        expected = np.concatenate([*cls[-variant.num_layers :], *mean])
        np.testing.assert_array_equal(features[COLUMNS.of(variant)], expected)
    assert [v.name for v in VARIANTS] == ["cls1", "cls1_mean", "cls4", "cls4_mean"]


def test_learning_rates():
    assert learning_rates("paper", batch_size=512) == LEARNING_RATES["paper"]
    assert learning_rates("code", batch_size=512) == tuple(2 * x for x in LEARNING_RATES["code"])
    assert learning_rates([0.3], batch_size=512) == (0.3,)
    assert all(len(rates) == 13 for rates in LEARNING_RATES.values())


def test_weights_start_as_the_references():
    state = init_probe(
        jax.random.key(0),
        [Variant(1, False)],
        columns=Columns(1, 200, 0),
        num_rates=3,
        num_classes=50,
    )
    kernel = np.asarray(state.params["cls1"]["kernel"])
    assert kernel.std() == pytest.approx(0.01, rel=0.02) and abs(kernel.mean()) < 2e-4
    assert not np.asarray(state.params["cls1"]["bias"]).any()
    assert not np.allclose(kernel[:, 0], kernel[:, 1])


@pytest.mark.parity
def test_weights_are_those_of_pytorch():
    torch = require("torch")
    features, labels = make_batches()
    state = make_state()
    heads, groups = {}, []
    for variant in VARIANTS:
        for i, rate in enumerate(RATES):
            tree = state.params[variant.name]
            head = torch.nn.Linear(tree["kernel"].shape[0], CLASSES)
            with torch.no_grad():
                head.weight.copy_(torch.tensor(np.array(tree["kernel"])[:, i].T))
                head.bias.zero_()
            heads[variant, i] = head
            groups.append({"params": head.parameters(), "lr": rate})
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=0)
    losses = np.zeros((STEPS, len(VARIANTS), len(RATES)))
    for step, (x, y) in enumerate(zip(features, labels, strict=True)):
        found = {
            (variant, i): torch.nn.functional.cross_entropy(
                head(torch.tensor(x[:, COLUMNS.of(variant)])), torch.tensor(y, dtype=torch.long)
            )
            for (variant, i), head in heads.items()
        }
        losses[step] = np.reshape([x.item() for x in found.values()], losses.shape[1:])
        optimizer.zero_grad()
        sum(found.values()).backward()
        optimizer.step()
        scheduler.step()

    state, ours = train(state, features, labels)
    np.testing.assert_allclose(ours, losses, atol=1e-5)
    for (variant, i), head in heads.items():
        tree = state.params[variant.name]
        weight, bias = head.weight.detach().numpy(), head.bias.detach().numpy()
        np.testing.assert_allclose(np.asarray(tree["kernel"])[:, i].T, weight, atol=1e-5)
        np.testing.assert_allclose(np.asarray(tree["bias"])[i], bias, atol=1e-5)
        assert np.abs(weight).max() > 0.02  # far from where it began


def test_steps_in_pieces_are_the_same_steps():
    features, labels = make_batches()
    whole, _ = train(make_state(), features, labels)
    parts = make_state()
    for start in range(0, STEPS, 3):
        parts, _ = train(parts, features[start : start + 3], labels[start : start + 3])
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_one_that_diverges_leaves_the_others_alone():
    features, labels = make_batches()
    sound, _ = train(make_state(), features, labels)
    broken, _ = train(make_state(), features * 1e18, labels, rates=(1e-45, 1e38, 1e-45))
    found = is_finite(broken.params, VARIANTS)
    assert found[:, [0, 2]].all() and not found[:, 1].any()
    assert is_finite(sound.params, VARIANTS).all()


def test_predictions_are_of_each_classifiers_own_columns():
    state, (features, _) = make_state(), make_batches(1)
    predicted = predict_grid(state.params, features[0], variants=VARIANTS, columns=COLUMNS)
    assert predicted.shape == (len(VARIANTS), len(RATES), BATCH)
    for i, variant in enumerate(VARIANTS):
        kernel = np.asarray(state.params[variant.name]["kernel"])
        for j in range(len(RATES)):
            expected = (features[0][:, COLUMNS.of(variant)] @ kernel[:, j]).argmax(axis=1)
            np.testing.assert_array_equal(predicted[i, j], expected)
