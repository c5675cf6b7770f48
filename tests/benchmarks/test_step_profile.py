"""The profile of a step: kinds of its instructions, and times that are not counted twice."""

import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks import step_profile
from dinov2_jax.models.vit import VisionTransformer


def test_what_is_inside_another_is_not_counted_twice():
    events = [(5, 6, "a"), (0, 10, "loop"), (1, 4, "a"), (2, 3, "b"), (10, 12, "b")]
    assert step_profile.self_times(events) == {"loop": 6, "a": 3, "b": 3}


@pytest.fixture(scope="module")
def hlo() -> str:
    """A small network's gradient, compiled."""
    network = VisionTransformer(patch_size=4, embed_dim=32, depth=2, num_heads=2, remat="dots")
    images = jnp.zeros((4, 16, 16, 3))
    params = network.init(jax.random.key(0), images)

    def loss(params):
        return jnp.sum(network.apply(params, images).cls ** 2)

    return jax.jit(jax.grad(loss)).lower(params).compile().as_text()


def test_products_are_those_with_weights_and_attention_has_its_own(hlo):
    kinds = step_profile.kinds_of_program(hlo)
    products = re.findall(r"%([\w.-]+) = \S+ dot\(.*?op_name=\"([^\"]*)\"", hlo)
    assert len(products) > 12
    for name, path in products:
        is_weighing = "/attn/" in path and "qkv" not in path and "proj" not in path
        assert kinds[name] == ("attention" if is_weighing else "products"), path
    assert {"products", "attention", "normalisation", "GELU", "scan's arrays"} <= set(
        kinds.values()
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "products"),
        ("aten::bmm", "attention"),
        ("aten::_softmax_backward_data", "attention"),
        ("aten::gelu_backward", "GELU"),
        ("aten::native_layer_norm", "normalisation"),
        ("aten::_foreach_mul_", "optimizer and EMA"),
        ("aten::mul", "the rest"),
    ],
)
def test_operations_of_the_reference_have_their_kind(name, kind):
    assert step_profile.kind_of(name, step_profile.REFERENCE) == kind


def test_the_table_has_every_kind_and_the_sums():
    ours, reference = {"products": 400.4, "the rest": 20.2}, {"GELU": 10.0}
    rows = step_profile.table(ours, reference).splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in rows[2:-1]] == list(step_profile.KINDS)
    assert rows[2] == "| products | 400 | 0 |" and rows[-1] == "| all | 421 | 10 |"
