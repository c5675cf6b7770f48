"""The optimizer: by formula, and against torch's AdamW with parameter groups and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dinov2_jax.optim.optimizer import clip_by_module, make_optimizer, module_norms
from dinov2_jax.optim.schedules import Hyperparameters
from tests.parity import require

SETTINGS = dict(b1=0.9, b2=0.95, eps=1e-8, clip_norm=3.0)
# One leaf for every combination that the reference has; blocks are stacked.
LR = {
    "backbone": {"a": 0.5, "blocks": np.array([0.25, 0.75]).reshape(2, 1, 1)},
    "dino_head": {"bias": 1.0, "last_layer": 1.0},
}
WD = {"backbone": {"a": 1.0, "blocks": 1.0}, "dino_head": {"bias": 0.0, "last_layer": 1.0}}
LAST = {
    "backbone": {"a": False, "blocks": False},
    "dino_head": {"bias": False, "last_layer": True},
}


def draw(seed: int, backbone_scale: float = 1.0) -> dict:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return {
        "backbone": {"a": normal(3) * backbone_scale, "blocks": normal(2, 4, 5) * backbone_scale},
        "dino_head": {"bias": normal(6), "last_layer": normal(7, 2)},
    }


def hyperparameters(step: int) -> Hyperparameters:
    values = (1e-2 * (step + 1), 0.0 if step < 2 else 2e-2, 0.5 + 0.1 * step, 0.9, 0.04)
    return Hyperparameters(*map(np.float32, values))


def make(**settings):
    return make_optimizer(
        **(SETTINGS | settings), lr_multipliers=LR, wd_multipliers=WD, is_last_layer=LAST
    )


def run(optimizer, num_steps: int = 5, backbone_scale=lambda step: 10.0 if step % 2 else 0.1):
    """Params after each step of a fixed sequence of gradients; some clip, some do not."""
    params = draw(0)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    history = []
    for step in range(num_steps):
        grads = draw(step + 1, backbone_scale(step))
        updates, state = update(grads, state, params, hyperparameters=hyperparameters(step))
        params = optax.apply_updates(params, updates)
        history.append(jax.tree.map(np.asarray, params))
    return history


def test_first_step_by_formula():
    """After one step the bias-corrected moments are the clipped gradient and its square."""
    optimizer = make()
    params, grads = draw(0), draw(1, backbone_scale=10.0)
    hyper = hyperparameters(2)
    updates, state = optimizer.update(grads, optimizer.init(params), params, hyperparameters=hyper)
    norm = np.sqrt(sum((leaf**2).sum() for leaf in grads["backbone"].values()))
    assert norm > SETTINGS["clip_norm"]
    g = grads["backbone"]["blocks"] * SETTINGS["clip_norm"] / (norm + 1e-6)
    direction = g / (np.abs(g) + 1e-8) + hyper.weight_decay * params["backbone"]["blocks"]
    want = -hyper.learning_rate * LR["backbone"]["blocks"] * direction
    np.testing.assert_allclose(updates["backbone"]["blocks"], want, rtol=1e-5)
    np.testing.assert_allclose(state.mu["backbone"]["blocks"], 0.1 * g, rtol=1e-5)
    # The biases do not decay.
    want = -hyper.learning_rate * np.sign(grads["dino_head"]["bias"])
    np.testing.assert_allclose(updates["dino_head"]["bias"], want, rtol=1e-5)


def test_frozen_last_layer_stands_still_but_remembers():
    history = run(make())
    start = draw(0)["dino_head"]["last_layer"]
    np.testing.assert_array_equal(history[1]["dino_head"]["last_layer"], start)  # no decay either
    assert np.abs(history[2]["dino_head"]["last_layer"] - start).max() > 1e-3

    # The moments of the frozen steps count: not the same as a start from zero at step 2.
    optimizer = make()
    fresh, _ = optimizer.update(
        draw(3, 0.1), optimizer.init(draw(0)), draw(0), hyperparameters=hyperparameters(2)
    )
    moved = history[2]["dino_head"]["last_layer"] - start
    assert np.abs(moved - fresh["dino_head"]["last_layer"]).max() > 1e-3


@pytest.mark.parity
@pytest.mark.parametrize("clip_norm", [3.0, 0.0])
def test_five_steps_are_torch(clip_norm):
    """Groups as `apply_optim_scheduler` sets them: lr * multiplier, wd * multiplier."""
    torch = require("torch")
    tensors, groups, modules = {}, [], {"backbone": [], "dino_head": []}
    for module, leaves in draw(0).items():
        for name, leaf in leaves.items():
            # torch has one tensor per block, each with its own multiplier.
            parts = leaf if name == "blocks" else [leaf]
            for i, (part, lr) in enumerate(
                zip(parts, np.ravel(LR[module][name]).tolist(), strict=True)
            ):
                tensor = torch.nn.Parameter(torch.tensor(part))
                tensors[module, name, i] = tensor
                modules[module].append(tensor)
                groups.append({"params": [tensor], "m": (lr, WD[module][name], LAST[module][name])})
    adamw = torch.optim.AdamW(groups, betas=(SETTINGS["b1"], SETTINGS["b2"]))

    def backbone_scale(step):
        return 10.0 if step % 2 else 0.1

    history = run(make(clip_norm=clip_norm), backbone_scale=backbone_scale)
    for step, params in enumerate(history):
        hyper = hyperparameters(step)
        grads = draw(step + 1, backbone_scale(step))
        for group in adamw.param_groups:
            lr, wd, last = group["m"]
            rate = hyper.last_layer_learning_rate if last else hyper.learning_rate
            group["lr"], group["weight_decay"] = float(rate) * lr, float(hyper.weight_decay) * wd
        for (module, name, i), tensor in tensors.items():
            leaf = grads[module][name]
            tensor.grad = torch.tensor(leaf[i] if name == "blocks" else leaf)
        if clip_norm:
            for parameters in modules.values():
                torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        adamw.step()
        for (module, name, i), tensor in tensors.items():
            got = params[module][name][i] if name == "blocks" else params[module][name]
            np.testing.assert_allclose(got, tensor.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parity
# At tiny norms the 1e-6 in torch's law shows.
@pytest.mark.parametrize(
    ("scale", "clip_norm"), [(1e-8, 3.0), (0.01, 3.0), (1.0, 3.0), (1e4, 3.0), (1e-6, 1e-6)]
)
def test_clipping_is_torch(scale, clip_norm):
    torch = require("torch")
    grads = jax.tree.map(lambda leaf: leaf * np.float32(scale), draw(0))
    got = clip_by_module(grads, clip_norm)
    norms = module_norms(grads)
    for module, leaves in grads.items():
        tensors = [torch.nn.Parameter(torch.tensor(leaf)) for leaf in leaves.values()]
        for tensor in tensors:
            tensor.grad = tensor.detach().clone()
        norm = torch.nn.utils.clip_grad_norm_(tensors, clip_norm)
        np.testing.assert_allclose(norms[module], norm, rtol=1e-6)
        for leaf, tensor in zip(got[module].values(), tensors, strict=True):
            np.testing.assert_allclose(leaf, tensor.grad, rtol=1e-6)


def test_modules_are_clipped_apart():
    """A huge backbone gradient leaves the heads' alone; small ones are left alone everywhere."""
    grads = draw(0, backbone_scale=1e4)
    grads["dino_head"] = jax.tree.map(lambda leaf: 0.01 * leaf, grads["dino_head"])
    clipped = clip_by_module(grads, 3.0)
    np.testing.assert_allclose(module_norms(clipped)["backbone"], 3.0, rtol=1e-5)
    for name, leaf in grads["dino_head"].items():
        np.testing.assert_array_equal(clipped["dino_head"][name], leaf)
    assert clip_by_module(grads, 0) is grads


def test_one_adam_state_like_the_params():
    params = draw(0)
    state = make().init(params)
    assert jax.tree.structure(state.mu) == jax.tree.structure(params)
    assert len(jax.tree.leaves(state)) == 1 + 2 * len(jax.tree.leaves(params))


def test_zero_gradients_are_finite():
    optimizer = make()
    params = draw(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(
        zeros, optimizer.init(params), params, hyperparameters=hyperparameters(0)
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
