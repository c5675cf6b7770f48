"""Stochastic depth in the whole transformer: who is dropped where, on one device and on eight."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dinov2_jax.models.vit import VisionTransformer

DEPTH, GROUPS = 2, 8


def make(**settings) -> VisionTransformer:
    sizes = dict(patch_size=4, embed_dim=16, depth=DEPTH, num_heads=2, pos_embed_grid=(2, 2))
    return VisionTransformer(**(sizes | dict(layer_scale_init=1.0, drop_path_rate=0.4) | settings))


def make_images(rows=5):
    """Two image sizes, of 7 and 9 tokens; `rows` and twice as many of them in each group."""
    return jnp.zeros((GROUPS * rows, 8, 12, 3)), jnp.zeros((GROUPS * 2 * rows, 8, 16, 3))


def telltale_params(model):
    """Parameters with which branch `2 * layer + (attention 0, ffn 1)` adds 1 to that channel."""
    params = jax.eval_shape(model.init, jax.random.key(0), make_images())["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), params)
    blocks = params["blocks"]
    for layer in range(DEPTH):
        blocks["attn"]["proj"]["bias"][layer, 2 * layer] = 1
        blocks["mlp"]["fc2"]["bias"][layer, 2 * layer + 1] = 1
    for name in ("ls1", "ls2"):
        blocks[name]["gamma"][:] = 1
    params["norm"]["scale"][:] = 1
    return {"params": params}


def kept_branches(output) -> np.ndarray:
    """Which images kept each branch: bool `[branches, s, rows]`."""
    cls = np.asarray(output.cls)
    kept = cls[:, : 2 * DEPTH] > cls[:, -1:] + 1e-3  # above a channel that no branch touches
    return kept.T.reshape(2 * DEPTH, GROUPS, -1)


@functools.cache
def draws(model, num_seeds=1):
    """For each seed, from 0 on: which images kept each branch, for both image sizes."""

    @jax.jit
    def apply(params, images, seed):
        rngs = {"drop_path": jax.random.key(seed)}
        return model.apply(params, images, train=True, num_groups=GROUPS, rngs=rngs)

    params, images = telltale_params(model), make_images()
    return [
        tuple(kept_branches(output) for output in apply(params, images, seed))
        for seed in range(num_seeds)
    ]


def test_subset_draws_by_branch_array_and_group():
    (global_kept, local_kept), (others, _) = draws(make(), 2)
    np.testing.assert_array_equal(global_kept.sum(axis=-1), 3)  # int(5 * 0.6)
    np.testing.assert_array_equal(local_kept.sum(axis=-1), 6)
    # 10 ways to choose 3 of 5, in 8 groups: two branches agree everywhere once in 1e8 times.
    for kept in (global_kept, local_kept):
        assert len({branch.tobytes() for branch in kept}) == 2 * DEPTH, "branches draw alike"
        assert len({group.tobytes() for group in kept[0]}) > 1, "groups draw alike"
    assert not np.array_equal(global_kept[..., :5], local_kept[..., :5])
    assert not np.array_equal(global_kept, others)


def test_bernoulli_draws_too():
    kept = draws(make(drop_path_mode="bernoulli"))[0][1]
    assert len(np.unique(kept.sum(axis=-1))) > 2
    assert abs(kept.mean() - 0.6) < 4 * np.sqrt(0.24 / kept.size)


@pytest.mark.parametrize("settings", [dict(train=False), dict(train=True, drop_path_rate=0.0)])
def test_without_drop_path_all_is_kept_and_no_key_is_needed(settings):
    model = make(drop_path_rate=settings.get("drop_path_rate", 0.4))
    outputs = model.apply(telltale_params(model), make_images(), train=settings["train"])
    assert all(kept_branches(output).all() for output in outputs)


class TestEightDevices:
    """Groups are cut over the devices; parameters are whole (data) or in pieces (fsdp)."""

    @staticmethod
    def compiled_gradient(mesh, model, params, images):
        def loss(params, images):
            outputs = model.apply(
                params, images, train=True, num_groups=GROUPS, rngs={"drop_path": jax.random.key(0)}
            )
            return sum(jnp.sum(output.patches**2) for output in outputs), outputs

        def param_sharding(leaf):
            is_kernel = leaf.ndim == 3 and leaf.shape[0] == DEPTH
            return NamedSharding(mesh, P(None, None, "fsdp") if is_kernel else P())

        shardings = (
            jax.tree.map(param_sharding, params),
            jax.tree.map(lambda _: NamedSharding(mesh, P(("data", "fsdp"))), images),
        )
        with jax.set_mesh(mesh):
            gradient = jax.jit(jax.grad(loss, has_aux=True), in_shardings=shardings)
            return gradient.lower(params, images).compile(), shardings

    @pytest.mark.parametrize("fsdp", [1, 4])
    @pytest.mark.parametrize("form", ["gather", "matmul"])
    def test_no_activation_moves_and_the_draws_are_those_of_one_device(self, form, fsdp):
        model = make(drop_path_form=form)
        params, images = telltale_params(model), make_images()
        mesh = jax.make_mesh((8 // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
        gradient, shardings = self.compiled_gradient(mesh, model, params, images)

        # Collectives: gradients of parameters, and under fsdp the weights, once forward and once
        # backward whatever the number of image sizes. Activations have a token axis, or a flat
        # one: no other axis has such a length.
        results = re.findall(
            r"= (\S.*?) (all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(",
            gradient.as_text(),
        )
        assert results
        shapes = [
            [int(size) for size in shape.split(",") if size]
            for result, _ in results
            for shape in re.findall(r"f32\[([\d,]*)\]", result)
        ]
        tokens = {7, 9, 5 * 7, 3 * 7, 10 * 9, 6 * 9, 5 * 6, 10 * 8}
        assert not [shape for shape in shapes if tokens.intersection(shape)], shapes
        gathers = [result for result, kind in results if kind == "all-gather"]
        assert len(gathers) == (0 if fsdp == 1 else 2 * 4), gathers
        assert not {kind for _, kind in results} & {"all-to-all", "collective-permute"}

        _, outputs = gradient(*jax.device_put((params, images), shardings))
        for ours, alone in zip(outputs, draws(make(), 2)[0], strict=True):
            np.testing.assert_array_equal(kept_branches(ours), alone)
