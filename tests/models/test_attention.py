"""Attention against plain loops; softmax in float32."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from dinov2_jax.models import attention_pallas
from dinov2_jax.models.attention import (
    FEWEST_BY_HEAD,
    Attention,
    attend,
    attend_by_head,
    choose_implementation,
    computed_by,
    default_implementation,
)


def by_head(q, k, v):
    """As `attend`, `[b, heads, n, hd]`."""
    qkv = rearrange([q, k, v], "three b heads n hd -> b n (three heads hd)")
    x = attend_by_head(qkv, q.shape[1])
    return rearrange(x, "b n (heads hd) -> b heads n hd", heads=q.shape[1])


@pytest.mark.parametrize("attend", [attend, by_head])
def test_attend_equals_loops(attend):
    b, heads, n, hd = 2, 3, 5, 4
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, b, heads, n, hd)).astype(np.float32)
    expected = np.zeros_like(q)
    for image in range(b):
        for head in range(heads):
            for i in range(n):
                weights = [np.exp(q[image, head, i] @ k[image, head, j] / 2.0) for j in range(n)]
                for j in range(n):
                    expected[image, head, i] += weights[j] / sum(weights) * v[image, head, j]
    np.testing.assert_allclose(attend(q, k, v), expected, atol=1e-6)


def test_by_head_has_the_same_gradients_and_keeps_no_square_matrix():
    b, heads, n, hd = 2, 3, 50, 4
    q, k, v, grad = jax.random.normal(jax.random.key(0), (4, b, heads, n, hd))
    gradients, kept = [], []
    for function in (attend, by_head):
        _, pull = jax.vjp(function, q, k, v)
        gradients.append(pull(grad))
        kept.append({tuple(x.shape[-2:]) for x in jax.tree.leaves(pull)})
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert (n, n) in kept[0]
    assert (n, n) not in kept[1]


def test_few_tokens_are_left_to_xla():
    module = Attention(num_heads=2, implementation="by_head")
    params = None
    for n, is_loop in ((FEWEST_BY_HEAD - 1, False), (FEWEST_BY_HEAD, True)):
        x = jax.random.normal(jax.random.key(n), (2, n, 8))
        params = params or module.init(jax.random.key(0), x)
        assert ("scan" in str(jax.make_jaxpr(module.apply)(params, x))) == is_loop
        right = Attention(num_heads=2).apply(params, x)
        np.testing.assert_allclose(module.apply(params, x), right, rtol=1e-5, atol=1e-7)
        name = computed_by("by_head", n, 8, 2, jnp.float32)
        assert name == ("by_head" if is_loop else "xla")


def test_the_default_is_by_head_on_one_cpu_device_only(monkeypatch):
    assert jax.device_count() == 8
    assert default_implementation() == "xla"
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert default_implementation() == "by_head"
    for num_cores, expected in ((1, "by_head"), (2, "by_head"), (3, "xla")):
        monkeypatch.setattr("os.sched_getaffinity", lambda pid, n=num_cores: range(n))
        assert choose_implementation("auto", jax.devices()[0], jnp.float32) == expected
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert default_implementation() == "xla"


@pytest.mark.parametrize("attend", [attend, by_head])
def test_logits_are_float32_for_bfloat16_inputs(attend):
    # One logit of 8 + 1/32 among logits of 8: bfloat16 has no number between 8 and 8 + 1/16.
    n = 20
    q = jnp.zeros((1, 1, n, 4), jnp.bfloat16).at[..., :2].set(jnp.array([16, 1]))
    k = jnp.zeros((1, 1, n, 4), jnp.bfloat16).at[..., 0].set(1).at[0, 0, 0, 1].set(1 / 16)
    v = jnp.zeros((1, 1, n, 4), jnp.bfloat16).at[0, 0, 0].set(1)
    out = attend(q, k, v)
    assert out.dtype == jnp.bfloat16
    expected = np.exp(1 / 32) / (np.exp(1 / 32) + n - 1)
    np.testing.assert_allclose(np.float32(out), expected, rtol=2**-8)


def test_projection_is_queries_keys_values_head_major():
    b, n, heads, hd = 1, 4, 2, 3
    d = heads * hd
    x = np.random.default_rng(0).standard_normal((b, n, d)).astype(np.float32)
    module = Attention(num_heads=heads)
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda a: a * 20, params)
    q, k, v = np.split(x @ params["qkv"]["kernel"], 3, axis=-1)
    out = np.zeros((b, n, d), np.float32)
    for head in range(heads):
        part = slice(head * hd, (head + 1) * hd)
        weights = np.exp(q[..., part] @ k[..., part].swapaxes(1, 2) / np.sqrt(hd))
        out[..., part] = weights / weights.sum(axis=-1, keepdims=True) @ v[..., part]
    expected = out @ params["proj"]["kernel"]
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, atol=1e-5)


def test_cudnn_gets_its_own_layout(monkeypatch):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 3, 5, 8), jnp.bfloat16)
    original = jax.nn.dot_product_attention

    def on_cpu(q, k, v, *, implementation):
        assert (implementation, q.shape) == ("cudnn", (2, 5, 3, 8))  # [b, n, heads, hd]
        return original(q, k, v, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
    ours = attend(q, k, v, implementation="cudnn")
    np.testing.assert_allclose(
        np.float32(ours), np.float32(attend(q, k, v)), atol=2**-7, err_msg="bfloat16 rounding"
    )


@pytest.mark.parametrize(
    ("platform", "dtype", "compute_capability", "expected"),
    [
        ("cpu", "float32", None, "xla"),
        ("tpu", "bfloat16", None, "pallas"),
        ("tpu", "float32", None, "pallas"),
        ("gpu", "bfloat16", "9.0", "cudnn"),
        ("cuda", "bfloat16", "10.0", "cudnn"),
        ("gpu", "float32", "9.0", "xla"),
        ("gpu", "bfloat16", "8.0", "xla"),
        ("gpu", "bfloat16", "gfx942", "xla"),
        ("gpu", "bfloat16", None, "xla"),
    ],
)
def test_auto_follows_the_devices(platform, dtype, compute_capability, expected):
    device = types.SimpleNamespace(platform=platform)
    if compute_capability:  # AMD's is a name; not every kind of device has one
        device.compute_capability = compute_capability
    assert choose_implementation("auto", device, dtype) == expected
    assert choose_implementation("xla", device, dtype) == "xla"


def test_fused_attention_gives_way_where_it_does_not_fit(monkeypatch):
    monkeypatch.setattr(attention_pallas, "fits", lambda *sizes: False)
    x = jax.random.normal(jax.random.key(0), (1, 3, 8))
    module = Attention(num_heads=2, implementation="pallas")
    params = jax.jit(module.init)(jax.random.key(0), x)
    np.testing.assert_array_equal(module.apply(params, x), Attention(num_heads=2).apply(params, x))


@pytest.mark.parametrize(
    ("head_width", "compute_capability", "expected"),
    [
        (64, "9.0", "cudnn"),
        (60, "9.0", "xla"),
        (256, "10.0", "cudnn"),
        (264, "9.0", "xla"),
        (128, "8.0", "cudnn"),
        (136, "8.0", "xla"),
    ],
)
def test_heads_that_cudnn_refuses_are_left_to_xla(
    monkeypatch, head_width, compute_capability, expected
):
    device = types.SimpleNamespace(platform="gpu", compute_capability=compute_capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    d = 2 * head_width
    assert computed_by("cudnn", 257, d, 2, jnp.bfloat16) == expected
    # The module asks: what is refused is not called.
    asked = []
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda q, k, v, **_: asked.append(q.shape) or v
    )
    module = Attention(num_heads=2, implementation="cudnn", dtype=jnp.bfloat16)
    jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 3, d)))
    assert bool(asked) == (expected == "cudnn")


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"'cudnn' needs a GPU and bfloat16, not gpu and float32"):
        choose_implementation("cudnn", types.SimpleNamespace(platform="gpu"), jnp.float32)
    with pytest.raises(ValueError, match=r"'pallas' needs a TPU, not cpu; use 'auto' or 'xla'"):
        choose_implementation("pallas", jax.devices()[0], jnp.float32)
    with pytest.raises(ValueError, match=r"'by_head' needs one CPU device, not 8 of cpu, .* use"):
        choose_implementation("by_head", jax.devices()[0], jnp.float32)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert choose_implementation("by_head", jax.devices()[0], jnp.float32) == "by_head"
    with pytest.raises(ValueError, match=r"'by_head' needs one CPU device, not 1 of tpu"):
        choose_implementation("by_head", types.SimpleNamespace(platform="tpu"), jnp.float32)
    x = jnp.zeros((1, 1, 2, 4))
    with pytest.raises(ValueError, match=r"attention='flash' must be one of \('xla', 'by_head', "):
        attend(x, x, x, implementation="flash")
    with pytest.raises(ValueError, match=r"'cudnn' must have half-precision .* not float32; set"):
        attend(x, x, x, implementation="cudnn")
    with pytest.raises(ValueError, match=r"embed_dim=6 must be a multiple of num_heads=4"):
        Attention(num_heads=4).init(jax.random.key(0), jnp.zeros((1, 2, 6)))
