"""Blocks on a mesh: each kernel's gradient is summed over it once, whatever sizes crops have."""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamShapeError
from jax.sharding import NamedSharding, PartitionSpec

from dinov2_jax.models.block import REMATS
from dinov2_jax.models.vit import VisionTransformer
from dinov2_jax.sharding import batch_sharding, make_mesh, tree_sharding

SIZES = dict(patch_size=4, embed_dim=24, depth=2, num_heads=2, pos_embed_grid=(4, 4))
KERNELS = {"attn/qkv": 24 * 72, "attn/proj": 24 * 24, "mlp/fc1": 24 * 96, "mlp/fc2": 96 * 24}
KERNEL_SIZES = collections.Counter(KERNELS.values())


def setup(rows: tuple[int, int] = (16, 32), num_groups: int = 8, **settings):
    """The loss of parameters and crops of two sizes, and both."""
    model = VisionTransformer(**SIZES, layer_scale_init=1.0, drop_path_rate=0.25, **settings)
    rng = np.random.default_rng(0)
    shapes = ((rows[0], 16, 16, 3), (rows[1], 8, 8, 3))
    images = tuple(rng.standard_normal(shape, np.float32) for shape in shapes)
    params = model.init(jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), params)

    def loss(params, images):
        outputs = model.apply(
            {"params": params},
            images,
            train=True,
            num_groups=num_groups,
            rngs={"drop_path": jax.random.key(1)},
        )
        return sum(jnp.sum(x.patches**2) + jnp.sum(x.cls) for x in outputs)

    return loss, params, images


def on_mesh(mesh, loss, params, images, *, rows=None, min_size_to_shard_mb=0.0):
    """The compiled gradient, and its arguments on the mesh."""
    cut = tree_sharding(params, mesh, min_size_to_shard_mb=min_size_to_shard_mb)
    rows = rows or batch_sharding(mesh)
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss), in_shardings=(cut, rows), out_shardings=cut)
        compiled = gradient.lower(params, images).compile()
    return compiled, (jax.device_put(params, cut), jax.device_put(images, rows))


def sizes_in_loops(compiled, operation: str) -> list[int]:
    """Of the results of a collective inside the scans."""
    results = re.findall(rf"= (.*?) {operation}\(.*while/body", compiled.as_text())
    shapes = re.findall(r"\[([\d,]+)\]", " ".join(results))
    return [math.prod(map(int, shape.split(","))) for shape in shapes]


def assert_same(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@functools.cache
def gradient_of_one_device(**settings):
    loss, *arguments = setup(**settings)
    return jax.jit(jax.grad(loss))(*arguments)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize(
    "axes",
    [dict(data=8), dict(fsdp=8), dict(data=4, fsdp=2), dict(data=2, fsdp=2, model=2)],
    ids=str,
)
def test_gradients_are_those_of_one_device(axes, ffn):
    compiled, arguments = on_mesh(make_mesh(**axes), *setup(ffn=ffn))
    assert_same(compiled(*arguments), gradient_of_one_device(ffn=ffn))


def test_small_parameters_are_whole_on_each_device():
    mesh = make_mesh(data=2, fsdp=4)
    compiled, arguments = on_mesh(mesh, *setup(), min_size_to_shard_mb=4)
    assert_same(compiled(*arguments), gradient_of_one_device())


@pytest.mark.parametrize("axes", [dict(data=8), dict(data=4, fsdp=2)], ids=str)
@pytest.mark.parametrize("remat", REMATS)
def test_a_kernel_is_reduced_once(axes, remat):
    mesh = make_mesh(**axes)
    compiled, _ = on_mesh(mesh, *setup(remat=remat))
    # Over `data`, where what `fsdp` cuts is cut already.
    sizes = sizes_in_loops(compiled, "all-reduce")
    for size, expected in KERNEL_SIZES.items():
        assert sizes.count(size // mesh.shape["fsdp"]) == expected, size


@pytest.mark.parametrize("keep", [False, True], ids=["gather", "keep"])
@pytest.mark.parametrize("remat", REMATS)
def test_how_often_a_kernel_is_gathered(remat, keep):
    settings = setup(remat=remat, keep_kernels=keep)
    compiled, arguments = on_mesh(make_mesh(data=2, fsdp=4), *settings)
    sizes = sizes_in_loops(compiled, "all-gather")
    for size, expected in KERNEL_SIZES.items():
        assert sizes.count(size) == expected * (1 if keep else 2), size
    assert_same(compiled(*arguments), gradient_of_one_device())


@pytest.mark.parametrize("axes", [dict(data=8), dict(data=2, fsdp=4)], ids=str)
def test_kernels_are_kept_only_where_fsdp_cuts_them(axes):
    mesh = make_mesh(**axes)

    def temporary_bytes(keep: bool) -> int:
        compiled, _ = on_mesh(mesh, *setup(remat="blocks", keep_kernels=keep))
        return compiled.memory_analysis().temp_size_in_bytes

    # float32 of two blocks.
    kernels = 2 * 4 * sum(KERNELS.values()) if mesh.shape["fsdp"] > 1 else 0
    assert 0.9 * kernels <= temporary_bytes(True) - temporary_bytes(False) <= 1.1 * kernels


@pytest.mark.parametrize("remat", REMATS)
def test_a_mesh_changes_nothing_of_what_is_computed_again(remat):
    """The policies know products with weights by having no batch axis, which the copies have."""
    loss, *arguments = setup(remat=remat)

    def num_products() -> int:
        return str(jax.make_jaxpr(jax.grad(loss))(*arguments)).count("dot_general")

    alone = num_products()
    with jax.set_mesh(make_mesh(data=4, fsdp=2)):
        assert num_products() == alone


@pytest.mark.parametrize("rows, num_groups", [((12, 12), 4), ((16, 32), 4)], ids=["rows", "groups"])
def test_what_the_devices_do_not_divide(rows, num_groups):
    """Drop path leaves 3 of each group's 4 rows: 12 of 16."""
    mesh, settings = make_mesh(data=4, fsdp=2), dict(rows=rows, num_groups=num_groups)
    whole = NamedSharding(mesh, PartitionSpec())
    compiled, arguments = on_mesh(mesh, *setup(**settings), rows=whole)
    assert_same(compiled(*arguments), gradient_of_one_device(**settings))


def test_a_kernel_of_another_shape_is_named():
    loss, params, images = setup()
    params["blocks"]["mlp"]["fc1"]["kernel"] = np.zeros((2, 24, 95), np.float32)
    with jax.set_mesh(make_mesh(data=4, fsdp=2)), pytest.raises(ScopeParamShapeError, match="fc1"):
        jax.eval_shape(loss, params, images)


def test_one_size_needs_no_copies():
    loss, params, images = setup()
    with jax.set_mesh(make_mesh(data=4, fsdp=2)):
        both = str(jax.make_jaxpr(loss)(params, images))
        one = str(jax.make_jaxpr(lambda p: loss(p, images[:1]))(params))
    assert "f32[192,72]" in both and "f32[192,72]" not in one
