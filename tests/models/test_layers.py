"""The parts of a block against formulas, and their initial distributions."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax.models.layer_norm import LayerNorm
from dinov2_jax.models.layers import (
    LayerScale,
    Mlp,
    PatchEmbed,
    SwiGLU,
    TokenDense,
    choose_product_form,
    cpu_product,
    ffn_hidden_dim,
    gelu,
)
from dinov2_jax.sharding import make_mesh


def test_gelu_is_exact_in_value_and_gradient():
    x = np.linspace(-6, 6, 97)
    cdf = np.array([0.5 * (1 + math.erf(a / math.sqrt(2))) for a in x])
    density = np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(gelu(jnp.float32(x)), x * cdf, atol=5e-7)
    np.testing.assert_allclose(
        jax.vmap(jax.grad(gelu))(jnp.float32(x)), cdf + x * density, atol=1e-6
    )
    # The tanh approximation is off by up to 5e-4: these tolerances see it.
    assert np.abs(jax.nn.gelu(jnp.float32(x)) - x * cdf).max() > 1e-4


def test_half_precision_gelu_is_that_of_float32_rounded():
    x = jnp.linspace(-6, 6, 401).astype(jnp.bfloat16)
    exact = jax.nn.gelu(x.astype(jnp.float32), approximate=False)
    np.testing.assert_allclose(gelu(x).astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def test_gelu_keeps_the_type():
    x = jnp.ones(3, jnp.bfloat16)
    assert gelu(x).dtype == jnp.bfloat16
    assert jax.grad(lambda a: gelu(a).sum())(x).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("embed_dim", "mlp", "swiglu"),
    [(384, 1536, 1024), (768, 3072, 2048), (1024, 4096, 2736), (1536, 6144, 4096)],
)
def test_hidden_widths_are_the_released_ones(embed_dim, mlp, swiglu):
    assert ffn_hidden_dim(embed_dim, 4.0, "mlp") == mlp
    assert ffn_hidden_dim(embed_dim, 4.0, "swiglu") == swiglu


def test_unknown_ffn():
    with pytest.raises(ValueError, match=r"ffn='glu' must be one of \('mlp', 'swiglu'\)"):
        ffn_hidden_dim(8, 4.0, "glu")


def test_mlp_formula():
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    params = _random_params(Mlp(8), x)
    hidden = gelu(x @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    expected = hidden @ params["fc2"]["kernel"] + params["fc2"]["bias"]
    np.testing.assert_allclose(Mlp(8).apply({"params": params}, x), expected, atol=1e-5)


@pytest.mark.parametrize(("d", "f"), [(24, 8), (8, 24), (8, 8)])
def test_a_product_on_cpu_has_its_gradients_by_the_wider_product(d, f):
    x = jax.random.normal(jax.random.key(0), (50, d))
    kernel, grad = (jax.random.normal(jax.random.key(i), n) for i, n in ((1, (d, f)), (2, (50, f))))
    grads = jax.jit(lambda x, kernel: jax.vjp(cpu_product, x, kernel)[1](grad))
    np.testing.assert_allclose(cpu_product(x, kernel), x @ kernel, rtol=1e-6)
    for ours, right in zip(grads(x, kernel), (grad @ kernel.T, x.T @ grad), strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-5)
    text = grads.lower(x, kernel).compile().as_text()
    assert re.search(rf"f32\[{min(d, f)},{max(d, f)}\]\S* dot\(", text)


def test_a_layer_takes_it_on_one_device_alone():
    layer, x = TokenDense(3), jnp.ones((2, 5, 4))
    params = layer.init(jax.random.key(0), x)

    def forward() -> str:
        return str(jax.make_jaxpr(layer.apply)(params, x))

    assert "cpu_product" in forward()
    with jax.set_mesh(make_mesh(data=1, fsdp=1, model=1, devices=jax.devices()[:1])):
        assert "cpu_product" in forward()
    with jax.set_mesh(make_mesh(data=1, fsdp=2, model=1, devices=jax.devices()[:2])):
        assert "cpu_product" not in forward()


@pytest.mark.parametrize("ffn", [Mlp, SwiGLU])
@pytest.mark.parametrize("form", ["flat", "transposed"])
def test_forms_are_the_plain_one_in_value_and_gradient(ffn, form):
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    params = _random_params(ffn(16), x)

    def run(form):
        def loss(params, x):
            return (ffn(16, product_form=form).apply({"params": params}, x) ** 2).sum()

        text = str(jax.make_jaxpr(loss)(params, x))
        found = {len(n.split(",")) for n in re.findall(r"f32\[([\d,]+)\] = dot_general", text)}
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x), found, "cpu_product" in text

    want, *program = run("plain")
    assert program == [{3}, False]
    got, *program = run(form)
    assert program == [{2}, form == "transposed"]
    for left, right in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6 * np.abs(right).max())


@pytest.mark.parametrize(
    ("form", "platform", "num_devices", "expected"),
    [
        ("auto", "cpu", 1, "transposed"),
        ("auto", "cpu", 8, "flat"),
        ("auto", "tpu", 1, "plain"),
        ("auto", "gpu", 8, "plain"),
        ("plain", "cpu", 1, "plain"),
        ("flat", "tpu", 4, "flat"),
        ("transposed", "cpu", 1, "transposed"),
    ],
)
def test_the_choice_of_a_form(form, platform, num_devices, expected):
    assert choose_product_form(form, platform, num_devices) == expected


def test_forms_that_are_refused():
    for platform, num_devices in (("cpu", 2), ("tpu", 1)):
        message = f"'transposed' needs one CPU device, not {num_devices} of {platform}; use 'auto'"
        with pytest.raises(ValueError, match=message):
            choose_product_form("transposed", platform, num_devices)
    with pytest.raises(ValueError, match=r"product_form='wide' must be one of \('plain', 'flat'"):
        choose_product_form("wide", "cpu", 1)


def test_remat_keeps_a_product_on_cpu():
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    layer = jax.checkpoint(lambda x, k: jnp.sin(cpu_product(jnp.sin(x), k)), policy=policy)
    jaxpr = jax.make_jaxpr(jax.grad(lambda x, k: layer(x, k).sum(), argnums=(0, 1)))
    text = str(jaxpr(jnp.ones((5, 4)), jnp.ones((4, 3))))
    assert text.count("dot_general") == 3


def test_parts_are_those_of_the_whole_with_its_gradients():
    """What SwiGLU takes on TPU: two products of halves of the one kernel."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    whole, halves = TokenDense(10), TokenDense(10, num_parts=2)
    params = _random_params(whole, x)
    jax.tree.map(
        np.testing.assert_array_equal, *(m.init(jax.random.key(1), x) for m in (whole, halves))
    )

    def loss(module, params):
        out = module.apply({"params": params}, x)
        return (jnp.concatenate(out, axis=-1) if isinstance(out, tuple) else out) ** 2

    np.testing.assert_allclose(loss(halves, params), loss(whole, params), rtol=1e-5, atol=1e-6)
    grads = [jax.grad(lambda p, m=m: loss(m, p).sum())(params) for m in (whole, halves)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *grads)


@pytest.mark.parametrize("num_parts", [1, 2])
def test_a_bias_handed_out_gets_no_gradient_by_the_result(num_parts):
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    plain, layer = (TokenDense(10, hands_out_bias=h, num_parts=num_parts) for h in (False, True))
    params = _random_params(plain, x)
    out, bias = layer.apply({"params": params}, x)
    want = plain.apply({"params": params}, x)
    jax.tree.map(np.testing.assert_array_equal, out, want)
    assert isinstance(out, tuple) == (num_parts > 1)
    np.testing.assert_array_equal(bias, params["bias"])

    def loss(params):
        out, bias = layer.apply({"params": params}, x)
        return sum(a.sum() for a in jax.tree.leaves(out)) + 3 * bias.sum()

    grads = jax.grad(loss)(params)
    np.testing.assert_array_equal(grads["bias"], np.full(10, 3.0))
    np.testing.assert_allclose(
        grads["kernel"], np.broadcast_to(x.sum(axis=(0, 1))[:, None], (4, 10)), rtol=1e-5
    )


@pytest.mark.parametrize("ffn", [Mlp, SwiGLU])
def test_the_hidden_layer_is_written_on_tpu_and_the_same(monkeypatch, ffn):
    x, layer = jax.random.normal(jax.random.key(0), (2, 3, 8)), ffn(hidden_dim=16)
    params = _random_params(layer, x)

    def run():
        loss = lambda params: (layer.apply({"params": params}, x) ** 2).sum()  # noqa: E731
        return str(jax.make_jaxpr(loss)(params)), jax.value_and_grad(loss)(params)

    program, want = run()
    assert "optimization_barrier" not in program
    monkeypatch.setattr("dinov2_jax.models.layers.platform", lambda: "tpu")
    program, got = run()
    assert "optimization_barrier" in program
    for left, right in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6 * np.abs(right).max())


def test_swiglu_gate_is_the_first_half():
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    params = _random_params(SwiGLU(8), x)
    both = x @ params["w12"]["kernel"] + params["w12"]["bias"]
    gate, value = both[..., :8], both[..., 8:]
    expected = (gate / (1 + np.exp(-gate)) * value) @ params["w3"]["kernel"] + params["w3"]["bias"]
    np.testing.assert_allclose(SwiGLU(8).apply({"params": params}, x), expected, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_patch_embed_is_a_strided_convolution(channels):
    images = np.random.default_rng(0).standard_normal((2, 6, 9, channels)).astype(np.float32)
    params = _random_params(PatchEmbed(3, 4), images)
    assert params["proj"]["kernel"].shape == (3, 3, channels, 4)
    expected = np.zeros((2, 6, 4), np.float32)
    for row in range(2):
        for col in range(3):
            patch = images[:, 3 * row : 3 * row + 3, 3 * col : 3 * col + 3]
            expected[:, row * 3 + col] = np.einsum("bhwc,hwcd->bd", patch, params["proj"]["kernel"])
    expected += params["proj"]["bias"]
    np.testing.assert_allclose(
        PatchEmbed(3, 4).apply({"params": params}, images), expected, atol=1e-5
    )


def test_patch_embed_wants_whole_patches():
    with pytest.raises(ValueError, match=r"height=30 and width=28 .* patch_size=14; .* 28 x 28"):
        PatchEmbed(14, 4).init(jax.random.key(0), jnp.zeros((1, 30, 28, 3)))


def test_layer_norm_survives_high_norm_tokens_and_has_the_reference_eps():
    # E[x^2] - E[x]^2 would lose this variance of 1 beside a mean of 4096.
    x = 4096 + np.tile(np.float32([-1, 1]), 8)[None]
    norm = LayerNorm()
    params = norm.init(jax.random.key(0), x)
    np.testing.assert_allclose(norm.apply(params, x), x - 4096, atol=1e-6)
    small = 1e-3 * np.tile(np.float32([-1, 1]), 8)[None]  # variance 1e-6 = eps
    np.testing.assert_allclose(norm.apply(params, small), small * 1e3 / math.sqrt(2), rtol=1e-5)


def test_layer_scale_is_float32():
    x = jnp.full((1, 2, 3), 1 + 2**-7, jnp.bfloat16)
    out = LayerScale(1e-5).apply({"params": {"gamma": jnp.full(3, 1.001)}}, x)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, (1 + 2**-7) * 1.001, rtol=1e-6)


class TestInit:
    """Distributions of protocols: PyTorch's defaults where the reference leaves them."""

    @pytest.mark.parametrize("channels", [3, 4])
    def test_patch_embed_is_uniform(self, channels):
        images = jnp.zeros((1, 14, 14, channels))
        proj = PatchEmbed(14, 256).init(jax.random.key(0), images)["params"]["proj"]
        bound = 1 / math.sqrt(channels * 14 * 14)
        for leaf, tail in ((proj["kernel"], 1e-3), (proj["bias"], 0.03)):
            assert float(jnp.abs(leaf).max()) <= bound
            assert float(leaf.max()) > bound * (1 - tail)
            assert float(leaf.min()) < -bound * (1 - tail)
        std = bound / math.sqrt(3)
        np.testing.assert_allclose(proj["kernel"].std(), std, rtol=0.01)

    def test_linear_is_normal_and_not_truncated(self):
        params = TokenDense(512).init(jax.random.key(0), jnp.zeros((1, 1, 512)))["params"]
        np.testing.assert_allclose(params["kernel"].std(), 0.02, rtol=0.01)
        # Of 262144 draws the largest is beyond 4 standard deviations.
        assert float(jnp.abs(params["kernel"]).max()) > 4 * 0.02
        np.testing.assert_array_equal(params["bias"], 0)

    def test_layer_scale(self):
        gamma = LayerScale(1e-5).init(jax.random.key(0), jnp.zeros((1, 1, 4)))["params"]["gamma"]
        np.testing.assert_array_equal(gamma, np.full(4, 1e-5, np.float32))


def _random_params(module, x) -> dict:
    """Parameters of order 1, biases included."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)
