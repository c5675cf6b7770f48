"""The projection head: goldens, the live reference, normalisations, initial distribution."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax.convert.state_dict import from_reference, to_reference
from dinov2_jax.models.heads import DINOHead, WeightNormDense, l2_normalize
from tests.parity import require
from tests.reference.golden_values import arrays


def relative_error(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def load_golden():
    golden = {
        name[5:]: array
        for name, array in arrays("heads_losses.npz").items()
        if name.startswith("head/")
    }
    head = DINOHead(num_prototypes=512, hidden_dim=64, bottleneck_dim=32)
    names = {n.replace("param/", "dino_head."): a for n, a in golden.items() if "param/" in n}
    params = from_reference(names)["dino_head"]
    return golden, head, params


def test_golden_logits_and_gradients():
    golden, head, params = load_golden()

    def loss(params, x):
        logits = head.apply({"params": params}, x)
        return jnp.sum(logits**2), logits

    (gradients, dx), logits = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, golden["x"])
    # Float32 sums in another order; measured 1.5e-6 at most.
    assert relative_error(logits, golden["y"]) < 3e-6
    assert relative_error(dx, golden["dx_of_sum_y2"]) < 1e-5
    gradients = to_reference({"dino_head": gradients})
    expected = {n[5:]: a for n, a in golden.items() if n.startswith("grad/")}
    assert len(expected) == 8
    for name, gradient in expected.items():
        assert relative_error(gradients[f"dino_head.{name}"], gradient) < 1e-5, name


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_reference_module(num_layers):
    torch, reference = require("torch", "dinov2.layers.dino_head")
    torch.manual_seed(0)
    theirs = reference.DINOHead(12, 20, nlayers=num_layers, hidden_dim=16, bottleneck_dim=8)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    names = {f"ibot_head.{name}": value.numpy() for name, value in theirs.state_dict().items()}
    ours = DINOHead(20, hidden_dim=16, bottleneck_dim=8, num_layers=num_layers)
    params = from_reference(names)["ibot_head"]
    expected = jax.eval_shape(ours.init, jax.random.key(0), jnp.zeros((1, 12)))["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, expected)
    x = np.random.default_rng(0).standard_normal((2, 3, 12)).astype(np.float32)
    with torch.no_grad():
        logits = theirs(torch.tensor(x)).numpy()
    assert relative_error(ours.apply({"params": params}, x), logits) < 3e-6


def test_logits_are_cosines_times_weight_g():
    golden, head, params = load_golden()
    params = {**params, "last_layer": {**params["last_layer"]}}
    params["last_layer"]["weight_g"] = np.ones((512, 1), np.float32)
    logits = head.apply({"params": params}, golden["x"])
    assert np.abs(logits).max() <= 1 + 1e-6
    params["last_layer"]["weight_v"] = 7 * params["last_layer"]["weight_v"]
    np.testing.assert_allclose(head.apply({"params": params}, golden["x"]), logits, atol=1e-6)


def test_bfloat16_products_but_float32_normalisation_and_logits():
    golden, head, params = load_golden()
    exact = head.apply({"params": params}, golden["x"])
    logits = head.clone(dtype=jnp.bfloat16).apply({"params": params}, golden["x"])
    assert logits.dtype == jnp.float32
    assert 1e-4 < relative_error(logits, np.asarray(exact)) < 0.03
    # Not rounded to bfloat16 after the product.
    assert np.abs(logits - logits.astype(jnp.bfloat16).astype(jnp.float32)).max() > 0


def test_initial_distribution():
    head = DINOHead(num_prototypes=4096, hidden_dim=512, bottleneck_dim=64)
    params = jax.jit(head.init)(jax.random.key(0), jnp.zeros((1, 256)))["params"]
    bound = 1 / math.sqrt(64)
    weight_v = params["last_layer"]["weight_v"]
    assert weight_v.shape == (4096, 64)
    assert bound * 0.999 < weight_v.max() <= bound
    assert -bound <= weight_v.min() < -bound * 0.999
    np.testing.assert_allclose(weight_v.std(), bound / math.sqrt(3), rtol=0.01)
    np.testing.assert_array_equal(params["last_layer"]["weight_g"], np.ones((4096, 1)))
    for layer in params["mlp"].values():
        np.testing.assert_allclose(layer["kernel"].std(), 0.02, rtol=0.02)
        np.testing.assert_array_equal(layer["bias"], 0)


@pytest.mark.parametrize(
    ("bottleneck_dim", "num_parameters"), [(384, 58_593_664), (256, 41_554_176)]
)
def test_sizes_of_the_giant_heads(bottleneck_dim, num_parameters):
    head = DINOHead(num_prototypes=131_072, bottleneck_dim=bottleneck_dim)
    params = jax.eval_shape(head.init, jax.random.key(0), jnp.zeros((1, 1536)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == num_parameters


def test_l2_normalize_is_finite_at_zero_and_has_the_reference_eps():
    x = jnp.array([[0.0, 0.0], [3.0, 4.0], [3e-13, 4e-13]])
    np.testing.assert_allclose(l2_normalize(x), [[0, 0], [0.6, 0.8], [0.3, 0.4]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda a: l2_normalize(a)[0, 0])(x)).all()


def test_weight_norm_divides_by_the_norm_of_rows():
    weight_v, weight_g = np.float32([[3, 4], [0, 2]]), np.float32([[10], [1]])
    params = {"params": {"weight_v": weight_v, "weight_g": weight_g}}
    logits = WeightNormDense(2).apply(params, np.float32([[1, 0], [0, 1]]))
    np.testing.assert_allclose(logits, [[6, 0], [8, 1]], rtol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match=r"num_layers=0 must be at least 1"):
        DINOHead(8, num_layers=0).init(jax.random.key(0), jnp.zeros((1, 4)))
