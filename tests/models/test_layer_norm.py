"""The forms of layer normalisation against flax's; the TPU kernel interpreted, and compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dinov2_jax.cost.topology import open_topology
from dinov2_jax.models.layer_norm import choose_layer_norm, make_layer_norm
from dinov2_jax.models.layer_norm_pallas import normalize, vmem_bytes
from dinov2_jax.models.vit import VisionTransformer
from dinov2_jax.sharding import BATCH_AXES, make_mesh
from tests.any_order import assert_same_in_any_order

OTHERS = pytest.mark.parametrize("form", ["products", "pallas"])


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_grads(form, dtype, params, x, grad):
    norm = make_layer_norm(form, dtype=jnp.dtype(dtype))
    out, vjp = jax.vjp(lambda params, x: norm.apply({"params": params}, x), params, x)
    return out, vjp(grad.astype(dtype))


def draw(*shape, dtype="float32"):
    """Tokens far from 0, some of high norm, and parameters away from their start."""
    rng = np.random.default_rng(0)
    x = rng.normal(5, 1, shape) * np.where(rng.random(shape[:-1]) < 0.1, 50, 1)[..., None]
    params = {name: rng.normal(1, 0.3, shape[-1:]).astype(np.float32) for name in ("scale", "bias")}
    return params, jnp.asarray(x, dtype), jnp.asarray(rng.normal(size=shape), jnp.float32)


def assert_same(got, want, tolerance):
    for left, right in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert left.dtype == right.dtype
        left, right = np.float32(left), np.float32(right)
        np.testing.assert_allclose(left, right, atol=tolerance * np.abs(right).max(), rtol=0)


# One block; several of 256 tokens, the last of which reaches beyond; widths that are no whole tile.
@OTHERS
@pytest.mark.parametrize("shape", [(3, 5, 32), (2, 50, 200), (1, 700, 24)], ids=str)
def test_equals_flax(form, shape):
    case = draw(*shape)
    want = value_and_grads("xla", "float32", *case)
    assert_same(value_and_grads(form, "float32", *case), want, 3e-6)


@OTHERS
def test_rows_that_hardly_vary_have_the_reference_eps(form):
    params, x, grad = draw(2, 9, 64)
    case = params, 1e-3 * (x - jnp.mean(x, axis=-1, keepdims=True)), grad  # variances about 1e-6
    want = value_and_grads("xla", "float32", *case)
    assert_same(value_and_grads(form, "float32", *case), want, 3e-6)


@OTHERS
def test_bfloat16_has_float32_statistics(form):
    case = draw(2, 9, 64, dtype="bfloat16")
    want = value_and_grads("xla", "bfloat16", *case)
    assert_same(value_and_grads(form, "bfloat16", *case), want, 2**-7)


def test_blocks_may_come_in_any_order():
    def run(x, scale, bias, grad):
        out, vjp = jax.vjp(lambda *args: normalize(*args, x.dtype), x, scale, bias)
        return out, vjp(grad)

    params, x, grad = draw(4, 600, 24)
    vectors = params["scale"][None], params["bias"][None]
    kernels = {"layer_norm_forward", "layer_norm_backward"}
    assert_same_in_any_order(run, x, *vectors, grad, kernels=kernels)


@pytest.mark.parametrize("b", [16, 3])  # 3 images are cut over no 4 devices: each takes all
@OTHERS
def test_on_a_mesh(form, b):
    case = draw(b, 5, 32)
    want = value_and_grads("xla", "float32", *case)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, model=2)):
        assert_same(value_and_grads(form, "float32", *case), want, 3e-6)


@OTHERS
def test_parameters_and_features_of_a_backbone_are_the_same(form):
    sizes = dict(patch_size=7, embed_dim=32, depth=2, num_heads=2, pos_embed_grid=(2, 2))
    images = jax.random.normal(jax.random.key(0), (2, 14, 14, 3))
    forms = [VisionTransformer(**sizes, layer_norm=x) for x in ("xla", form)]
    params, other = (jax.jit(form.init)(jax.random.key(1), images) for form in forms)
    jax.tree.map(np.testing.assert_array_equal, params, other)
    want, got = (form.apply(params, images).patches for form in forms)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "platform", "expected"),
    [
        ("auto", "tpu", "pallas"),
        ("auto", "cpu", "products"),
        ("auto", "gpu", "xla"),
        ("xla", "tpu", "xla"),
        ("products", "cpu", "products"),
    ],
)
def test_the_choice(form, platform, expected):
    assert choose_layer_norm(form, platform) == expected


def test_wrong_choices():
    with pytest.raises(ValueError, match="layer_norm='pallas' needs a TPU, not cpu; use 'auto'"):
        choose_layer_norm("pallas", "cpu")
    with pytest.raises(ValueError, match="layer_norm='products' needs CPUs, not tpu; use 'auto'"):
        choose_layer_norm("products", "tpu")
    with pytest.raises(ValueError, match="layer_norm='fast' must be one of"):
        make_layer_norm("fast")


def test_vector_memory_is_whole_tiles():
    """Of 16 rows of bfloat16, or 8 of float32, and 128 lanes; each block is there twice."""
    blocks = [((1, 257, 1000), "bfloat16"), ((1, 1000), "float32")]
    computed = 3 * 4 * 264 * 1024
    assert vmem_bytes(blocks) == 2 * (2 * 272 * 1024 + 4 * 8 * 1024) + computed


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("shape", [(8, 50, 384), (8, 257, 1536), (8, 1370, 1536)], ids=str)
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_compiles_for_tpus(topology, shape):
    mesh = make_mesh(data=2, fsdp=2, devices=open_topology(topology).devices[:4])
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rows)
    vector = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    params = {"scale": vector, "bias": vector}
    with jax.set_mesh(mesh):
        text = value_and_grads.lower("pallas", "bfloat16", params, x, x).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
