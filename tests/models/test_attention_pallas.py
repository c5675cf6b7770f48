"""The TPU kernels, interpreted on CPU, against plain attention; and compiled for TPUs if possible.

Interpreted blocks hold NaN beyond the array: a kernel that lets its padding in gives NaN here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from jax.sharding import NamedSharding, PartitionSpec

from dinov2_jax.cost.topology import open_topology
from dinov2_jax.models import attention_pallas
from dinov2_jax.models.attention import attend
from dinov2_jax.models.attention_plan import Plan
from dinov2_jax.models.vit import VisionTransformer
from dinov2_jax.sharding import make_mesh
from tests.any_order import assert_same_in_any_order

self_attention = functools.partial(attention_pallas.self_attention, interpret=True)


@pytest.fixture
def interpreted(monkeypatch):
    """Modules with attention="pallas" run here too."""
    monkeypatch.setattr(attention_pallas, "self_attention", self_attention)


def plain(qkv, *, num_heads):
    pattern = "b n (three heads hd) -> three b heads n hd"
    q, k, v = rearrange(qkv, pattern, three=3, heads=num_heads)
    return rearrange(attend(q, k, v), "b heads n hd -> b n (heads hd)")


def make_backbone(**settings):
    sizes = dict(patch_size=7, embed_dim=32, depth=2, num_heads=2, pos_embed_grid=(2, 2))
    return VisionTransformer(**sizes, **settings)


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_grad(function, num_heads, qkv, grad):
    out, vjp = jax.vjp(functools.partial(function, num_heads=num_heads), qkv)
    return out, *vjp(grad)


def draw(b, n, num_heads, hd, dtype="float32", scale=1.0):
    keys = jax.random.split(jax.random.key(n))
    qkv = jax.random.normal(keys[0], (b, n, 3 * num_heads * hd), dtype) * scale
    return qkv, jax.random.normal(keys[1], (b, n, num_heads * hd), dtype)


def assert_equals_plain(num_heads, qkv, grad, **tolerance):
    ours = value_and_grad(self_attention, num_heads, qkv, grad)
    expected = value_and_grad(plain, num_heads, qkv, grad)
    for name, x, y in zip(("value", "gradient"), ours, expected, strict=True):
        assert x.dtype == qkv.dtype
        np.testing.assert_allclose(np.float32(x), np.float32(y), **tolerance, err_msg=name)


@pytest.mark.parametrize(
    ("b", "n", "num_heads", "hd"),
    [
        (3, 5, 2, 64),
        (5, 50, 4, 64),  # a second block of images, of which most do not exist
        (1, 257, 2, 64),
        (1, 330, 2, 64),  # three steps over the queries
        (2, 17, 3, 64),  # an odd head: one more of zeros
        (2, 16, 5, 20),  # in lanes of 32; no row of padding
        (1, 50, 1, 128),
        (1, 9, 1, 200),
    ],
)
def test_equals_plain_attention(b, n, num_heads, hd):
    assert_equals_plain(num_heads, *draw(b, n, num_heads, hd), atol=3e-6)


@pytest.mark.parametrize(
    ("b", "n", "num_heads", "hd"),
    [(5, 50, 4, 64), (1, 330, 2, 64), (2, 17, 3, 64), (2, 16, 5, 20)],
)
def test_bias_gets_the_sums_of_the_gradient(b, n, num_heads, hd):
    """Images that do not exist, queries in several steps, and padded heads add nothing."""
    qkv, grad = draw(b, n, num_heads, hd)
    bias = jnp.ones(qkv.shape[-1])
    _, vjp = jax.vjp(functools.partial(self_attention, num_heads=num_heads), qkv, bias)
    dqkv, dbias = vjp(grad)
    _, expected = value_and_grad(plain, num_heads, qkv, grad)
    np.testing.assert_allclose(dqkv, expected, atol=3e-6)
    np.testing.assert_allclose(dbias, expected.sum(axis=(0, 1)), atol=1e-5)


def test_images_may_come_in_any_order():
    """Sums over queries in steps and over images; blocks that the groups of heads share."""

    def run(qkv, bias, grad):
        out, vjp = jax.vjp(functools.partial(self_attention, num_heads=4), qkv, bias)
        return out, vjp(grad)

    qkv, grad = draw(3, 331, 4, 64)
    kernels = {"attention_forward", "attention_backward"}
    assert_same_in_any_order(run, qkv, jnp.ones(qkv.shape[-1]), grad, kernels=kernels)


@pytest.mark.parametrize("n", [5, 50])
def test_bfloat16_rounds_as_plain_attention(n):
    # Results are near 1 in size: an ulp or two of bfloat16.
    assert_equals_plain(2, *draw(2, n, 2, 64, "bfloat16"), atol=2**-6)


def test_large_logits_neither_overflow_nor_vanish():
    qkv, grad = draw(1, 20, 2, 64, scale=30.0)  # logits of thousands
    assert_equals_plain(2, qkv, grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("b", [16, 3])  # 3 images are cut over no 8 devices: each takes all
def test_each_device_takes_its_images(b):
    qkv, grad = draw(b, 5, 2, 64)
    expected = value_and_grad(plain, 2, qkv, grad)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, model=2)):
        text = jax.jit(lambda x: self_attention(x, num_heads=2)).lower(qkv).as_text()
        ours = value_and_grad(self_attention, 2, qkv, grad)
    assert ("sdy.manual_computation" in text) and ('{"data", "fsdp"}' in text) == (b == 16)
    for x, y in zip(ours, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=3e-6)


def test_backbone_on_eight_devices_equals_plain_attention(interpreted):
    """Inside the scan, with remat, subset drop path and a mesh; two sizes of images."""
    images = tuple(
        jax.random.normal(jax.random.key(b), (b, s, s, 3)) for b, s in ((16, 14), (32, 7))
    )
    results = []
    for attention in ("pallas", "xla"):
        backbone = make_backbone(
            attention=attention, remat="dots", drop_path_rate=0.5, layer_scale_init=1.0
        )
        params = jax.jit(backbone.init)(jax.random.key(0), images)

        def total(params, backbone=backbone):
            outputs = backbone.apply(
                params, images, train=True, num_groups=8, rngs={"drop_path": jax.random.key(1)}
            )
            return sum((output.patches**3).sum() for output in outputs)

        with jax.set_mesh(make_mesh(data=4, fsdp=2)):
            results.append(jax.jit(jax.value_and_grad(total))(params))
    for ours, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("remat", "runs"), [("none", 1), ("dots", 1), ("branches", 1), ("blocks", 2)]
)
def test_dots_keeps_the_result_and_blocks_makes_it_again(interpreted, remat, runs):
    backbone, images = make_backbone(attention="pallas", remat=remat), jnp.zeros((2, 14, 14, 3))
    params = jax.eval_shape(backbone.init, jax.random.key(0), images)
    gradient = jax.grad(lambda params: backbone.apply(params, images).cls.sum())
    text = str(jax.make_jaxpr(gradient)(params))
    assert text.count("name=attention_forward") == runs
    assert text.count("name=attention_backward") == 1


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("n", [5, 32, 50, 257, 1370])
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_compiles_for_tpus(topology, n):
    mesh = make_mesh(data=2, fsdp=2, devices=open_topology(topology).devices[:4])
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    qkv, grad = (
        jax.ShapeDtypeStruct((8, n, width), jnp.bfloat16, sharding=rows) for width in (384, 128)
    )

    def both(qkv, grad):
        function = functools.partial(attention_pallas.self_attention, num_heads=2)
        out, vjp = jax.vjp(function, qkv)
        return out, vjp(grad)

    with jax.set_mesh(mesh):
        # ViT-g; at 518 px not on the smallest chip, where 128 wide does.
        assert attention_pallas.fits(n, 1536, 24) == (n < 1370 or not topology.startswith("v4"))
        text = jax.jit(both).lower(qkv, grad).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert not [kind for kind in ("all-gather", "all-reduce", "all-to-all") if kind in text]


def test_the_largest_images_do_not_fit_the_smallest_chip(monkeypatch):
    chip = type("Chip", (), {"vmem_capacity_bytes": 16 * 2**20})
    monkeypatch.setattr(attention_pallas.pltpu, "is_tpu_device", lambda: True)
    monkeypatch.setattr(attention_pallas.pltpu, "get_tpu_info", lambda: chip)
    assert attention_pallas.fits(257, 1536, 24)  # ViT-g in training
    assert not attention_pallas.fits(1370, 1024, 16)  # ViT-L at 518 px


@pytest.mark.parametrize(("b", "n", "d", "heads"), [(1, 577, 768, 8), (8, 50, 480, 5)])
def test_what_fits_is_planned_as_the_kernel_asks(monkeypatch, b, n, d, heads):
    """Padded heads, of 96 to 128 lanes or of an odd number, and several images in a step."""
    asked = []
    monkeypatch.setattr(
        Plan,
        "compiler_params",
        lambda plan, _, itemsize: asked.append(plan.vmem_bytes(itemsize)),
    )
    qkv = jnp.zeros((b, n, 3 * d), jnp.bfloat16)
    run = functools.partial(attention_pallas.self_attention, num_heads=heads, interpret=True)
    jax.eval_shape(run, qkv)
    (needed,) = asked
    chip = type("Chip", (), {"vmem_capacity_bytes": needed})
    monkeypatch.setattr(attention_pallas.pltpu, "is_tpu_device", lambda: True)
    monkeypatch.setattr(attention_pallas.pltpu, "get_tpu_info", lambda: chip)
    assert attention_pallas.fits(n, d, heads)
    chip.vmem_capacity_bytes -= 1
    assert not attention_pallas.fits(n, d, heads)
