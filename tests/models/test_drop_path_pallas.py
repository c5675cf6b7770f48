"""Stochastic depth by the TPU kernels, interpreted, against gathers; and compiled if possible."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dinov2_jax.cost.topology import open_topology
from dinov2_jax.models.block import Block
from dinov2_jax.models.drop_path import DropPath
from dinov2_jax.models.drop_path_pallas import fork, join
from dinov2_jax.models.vit import VisionTransformer
from dinov2_jax.sharding import BATCH_AXES, make_mesh, shard_rows, tree_sharding
from tests.any_order import assert_same_in_any_order

FORMS = {"gather": "xla", "matmul": "xla", "pallas": "pallas"}  # and of layer normalisation
subset = functools.partial(DropPath, 0.4, "subset")


def draw(groups, rows, n, d, dtype="float32"):
    """A stream far from 0, some tokens of high norm; the gradient of what comes after."""
    rng = np.random.default_rng(0)
    x = rng.normal(2, 1, (groups * rows, n, d))
    x *= np.where(rng.random(x.shape[:-1]) < 0.1, 20, 1)[..., None]
    return jnp.asarray(x, dtype), jnp.asarray(rng.normal(size=x.shape), dtype)


@functools.cache
def random_params(d, dtype, ffn):
    block = Block(num_heads=1, ffn=ffn, layer_scale_init=0.5, dtype=jnp.dtype(dtype))
    params = block.init(jax.random.key(0), ((jnp.zeros((1, 2, d)),), None), None, None)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        leaf + 0.3 * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_grads(drop_path, ffn, params, x, grad):
    """A block's output, and the gradients of its parameters and of its input."""
    norm, dtype = FORMS[drop_path.form], x.dtype
    block = Block(1, ffn, layer_scale_init=0.5, dtype=dtype, layer_norm=norm)

    def run(params, x):
        rngs = {"drop_path": jax.random.key(2)}
        (out, _), _ = block.apply({"params": params}, ((x,), None), None, drop_path, rngs=rngs)
        return out[0]

    out, pull = jax.vjp(run, params, shard_rows(x))
    return out, pull(grad)


def assert_same(got, want, tolerance):
    paths = jax.tree_util.tree_leaves_with_path(want)
    for left, (path, right) in zip(jax.tree.leaves(got), paths, strict=True):
        assert left.dtype == right.dtype
        left, right = np.float32(left), np.float32(right)
        far = np.abs(left - right).max()
        assert far <= tolerance * np.abs(right).max(), (jax.tree_util.keystr(path), far)


# Groups of several rows; one block of tokens, and several, the last of which reaches beyond.
@pytest.mark.parametrize(
    ("groups", "rows", "n", "ffn"), [(3, 5, 7, "mlp"), (2, 4, 6, "swiglu"), (2, 4, 330, "mlp")]
)
def test_equals_gathers(groups, rows, n, ffn):
    case = (random_params(16, "float32", ffn), *draw(groups, rows, n, 16))
    want = value_and_grads(subset(groups), ffn, *case)
    assert_same(value_and_grads(subset(groups, "pallas"), ffn, *case), want, 5e-6)


def test_bfloat16_is_as_near_to_float32_as_products_are():
    params = random_params(16, "float32", "mlp")
    x, grad = draw(3, 5, 7, 16, "bfloat16")
    exact = value_and_grads(subset(3), "mlp", params, *(jnp.float32(a) for a in (x, grad)))

    def errors(form):
        got = value_and_grads(subset(3, form), "mlp", params, x, grad)
        assert got[0].dtype == got[1][1].dtype == jnp.bfloat16
        pairs = zip(*map(jax.tree.leaves, (got, exact)), strict=True)
        return np.array([np.linalg.norm(np.float32(a) - b) / np.linalg.norm(b) for a, b in pairs])

    by_products, by_kernels = errors("matmul"), errors("pallas")
    assert by_kernels.mean() < 1.1 * by_products.mean()
    assert (by_kernels < 1.5 * by_products).all()


# What draws image by image, and groups of one image, of which none can be left out.
@pytest.mark.parametrize(("mode", "rows"), [("bernoulli", 4), ("subset", 1)])
def test_a_branch_of_all_images_is_the_same(mode, rows):
    case = (random_params(16, "float32", "mlp"), *draw(3, rows, 5, 16))
    want, got = (
        value_and_grads(DropPath(0.4, mode, 3, form), "mlp", *case) for form in ("gather", "pallas")
    )
    assert_same(got, want, 5e-6)


@pytest.mark.parametrize("groups", [8, 3])  # 3 groups are cut over no 4 devices: each takes all
def test_on_a_mesh(groups):
    case = (random_params(16, "float32", "mlp"), *draw(groups, 4, 5, 16))
    want = value_and_grads(subset(groups), "mlp", *case)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, model=2)):
        assert_same(value_and_grads(subset(groups, "pallas"), "mlp", *case), want, 5e-6)


def test_images_may_come_in_any_order():
    def run(x, scale, bias, gamma, grad):
        def branch(x, scale, bias, gamma):
            x, normal = fork(x, scale, bias, order, 3, x.dtype)
            return join(x, normal, bias[0], gamma, order)

        out, pull = jax.vjp(branch, x, scale, bias, gamma)
        return out, pull(grad)

    x, grad = draw(2, 5, 512, 8)  # the simulator knows no results in place that reach beyond
    order = jnp.array([[4, 0, 2, 1, 3], [1, 3, 0, 2, 4]])
    names = ("fork", "join", "join_backward", "fork_backward")
    vectors = jnp.linspace(0.5, 1, 24).reshape(3, 1, 8)
    kernels = {f"drop_path_{name}" for name in names}
    assert_same_in_any_order(run, x, *vectors, grad, kernels=kernels)


def test_the_stream_passes_dropped_images_untouched():
    x, grad = draw(2, 5, 3, 8)
    order = jnp.array([[4, 0, 2, 1, 3], [1, 3, 0, 2, 4]])
    one = jnp.ones((1, 8))
    (through, normal), pull = jax.vjp(lambda x: fork(x, one, one, order, 2, x.dtype), x)
    np.testing.assert_array_equal(through, x)
    taken = x[np.array([4, 0, 6, 8])]
    centred = taken - taken.mean(axis=-1, keepdims=True)
    np.testing.assert_allclose(normal, centred / taken.std(axis=-1, keepdims=True) + 1, atol=1e-5)
    dropped = np.array([2, 1, 3, 5, 7, 9])
    (dx,) = pull((grad, normal))
    np.testing.assert_array_equal(dx[dropped], grad[dropped])
    out = join(x, normal, one[0], one, order)
    np.testing.assert_array_equal(out[dropped], x[dropped])
    np.testing.assert_allclose(out[np.array([4, 0, 6, 8])], taken + normal, atol=1e-6)


def make_backbone(form, **settings):
    sizes = dict(patch_size=7, embed_dim=32, depth=2, num_heads=2, pos_embed_grid=(2, 2))
    settings = dict(drop_path_form=form, layer_norm=FORMS[form]) | settings
    return VisionTransformer(**sizes, drop_path_rate=0.5, layer_scale_init=1.0, **settings)


@functools.cache
def params_and_images():
    images = (jnp.ones((8, 14, 14, 3)), jnp.linspace(0, 1, 16 * 49 * 3).reshape(16, 7, 7, 3))
    return jax.jit(make_backbone("gather").init)(jax.random.key(1), images), images


def value_and_gradient(model):
    """Of the backbone, as a function of parameters and images."""

    def loss(params, images):
        rngs = {"drop_path": jax.random.key(3)}
        outs = model.apply(params, images, train=True, num_groups=4, rngs=rngs)
        return sum((out.patches**2 * out.cls[:, None]).mean() for out in outs)

    return jax.value_and_grad(loss)


@functools.cache
def backbone_by_gathers():
    return jax.jit(value_and_gradient(make_backbone("gather")))(*params_and_images())


@pytest.mark.parametrize("remat", ["none", "dots", "branches", "blocks"])
def test_a_backbone_and_its_gradient_are_the_same(remat):
    run = jax.jit(value_and_gradient(make_backbone("pallas", remat=remat)))
    assert_same(run(*params_and_images()), backbone_by_gathers(), 2e-5)


def test_a_backbone_on_a_mesh_that_cuts_its_parameters():
    params, images = params_and_images()
    mesh = make_mesh(data=2, fsdp=2, model=2)
    cut = tree_sharding(params, mesh, min_size_to_shard_mb=0)
    specs = {sharding.spec for sharding in jax.tree.leaves(cut["params"]["blocks"])}
    assert PartitionSpec(None, "fsdp") in specs and PartitionSpec(None, None, "fsdp") in specs
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    with jax.set_mesh(mesh):
        model = make_backbone("pallas", remat="branches")
        run = jax.jit(value_and_gradient(model), in_shardings=(cut, rows))
        assert_same(
            run(*jax.device_put((params, images), (cut, rows))), backbone_by_gathers(), 2e-5
        )


def kernels(model) -> dict[str, int]:
    """How often the gradient's program has each kernel."""
    text = str(jax.make_jaxpr(value_and_gradient(model))(*params_and_images()))
    return dict(collections.Counter(re.findall(r"name=((?:drop_path|layer_norm)\w+)", text)))


@pytest.mark.parametrize("remat", ["none", "dots", "branches", "blocks"])
def test_what_a_gradient_runs_twice(remat):
    """Of a scanned block's two branches and two image sizes: what makes a branch's input again.

    That of the second branch is the first one's join; the second one's join nobody needs again.
    """
    again = remat != "none"
    assert kernels(make_backbone("pallas", remat=remat)) == {
        "drop_path_fork": 8 if again else 4,
        "drop_path_join": 6 if again else 4,
        "drop_path_join_backward": 4,
        "drop_path_fork_backward": 4,
    }
    norms = {"layer_norm_forward": 8 if again else 4, "layer_norm_backward": 4}
    assert kernels(make_backbone("pallas", remat=remat, drop_path_mode="bernoulli")) == norms


def test_kernels_need_the_kernel_of_layer_normalisation():
    sizes = dict(patch_size=7, embed_dim=32, depth=2, num_heads=2)
    model = VisionTransformer(**sizes, drop_path_form="pallas")
    with pytest.raises(ValueError, match="drop_path_form='pallas' needs layer_norm='pallas', not"):
        model.init(jax.random.key(0), jnp.zeros((1, 14, 14, 3)))


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("size", [(32, 50, 384), (32, 257, 1536), (32, 1370, 1536)], ids=str)
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_compiles_for_tpus(topology, size):
    b, n, d = size
    mesh = make_mesh(data=2, fsdp=2, devices=open_topology(topology).devices[:4])
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    x = jax.ShapeDtypeStruct((b, n, d), jnp.bfloat16, sharding=rows)
    order = jax.ShapeDtypeStruct((8, b // 8), jnp.int32, sharding=rows)  # two groups a device
    vector = jax.ShapeDtypeStruct((1, d), jnp.float32)

    @jax.jit
    def both(order, x, scale, bias, gamma, grad):
        def run(x, scale, bias, gamma):
            x, normal = fork(x, scale, bias, order, 2, x.dtype)
            return shard_rows(join(x, normal, bias[0], gamma, order))

        out, pull = jax.vjp(run, x, scale, bias, gamma)
        return out, pull(grad)

    with jax.set_mesh(mesh):
        text = both.lower(order, x, vector, vector, vector, x).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 4
    assert "all-gather" not in text and "all-to-all" not in text
