"""The profile of a step: kinds of its instructions, and columns that add up to a step's time."""

import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks import step_profile
from dinov2_jax.losses.linear_cross_entropy import linear_cross_entropy
from dinov2_jax.models.layer_norm import choose_layer_norm
from dinov2_jax.models.vit import VisionTransformer
from tests.parity import require
from tests.small_run import SHRINK


def test_what_is_inside_another_is_not_counted_twice():
    events = [(5, 6, "a"), (0, 10, "loop"), (1, 4, "a"), (2, 3, "b"), (10, 12, "b")]
    assert step_profile.self_times(events) == {"loop": 6, "a": 3, "b": 3}


@pytest.fixture(scope="module")
def hlo() -> str:
    """The gradient of a small network with what a run on CPU has, and of its loss, compiled."""
    network = VisionTransformer(
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        remat="dots",
        layer_norm=choose_layer_norm("auto", "cpu"),
    )
    images = jnp.zeros((4, 16, 16, 3))
    params = network.init(jax.random.key(0), images)

    def loss(params):
        features = network.apply(params, images).cls[None]
        targets, weights = jnp.full((1, 4, 16), 1 / 16), jnp.ones((1, 4))
        prototypes = jax.random.normal(jax.random.key(1), (16, 32))
        return linear_cross_entropy(features, prototypes, targets, weights, 0.1)[0]

    return jax.jit(jax.grad(loss)).lower(params).compile().as_text()


def test_products_are_those_with_weights_and_attention_has_its_own(hlo):
    kinds = step_profile.kinds_of_program(hlo)
    products = re.findall(r"%([\w.-]+) = \S+ dot\(.*?op_name=\"([^\"]*)\"", hlo)
    assert len(products) > 12
    for name, path in products:
        is_weighing = "/attn/" in path and "qkv" not in path and "proj" not in path
        assert kinds[name] == ("attention" if is_weighing else "products"), path
    assert {"products", "attention", "normalisation", "GELU", "scan"} <= set(kinds.values())


def test_sums_of_rows_are_no_products_though_they_are_written_so(hlo):
    """Of tokens in a scan they are layer normalisation's, of the batch's four rows the loss's."""
    kinds = step_profile.kinds_of_program(hlo)
    sums = re.findall(r"%([\w.-]+) = f32\[(\d+),1\]\S* dot\(", hlo)
    assert {rows for _, rows in sums} == {"68", "4"}
    for name, rows in sums:
        assert kinds[name] == ("normalisation" if rows == "68" else "all else"), name


@pytest.mark.parametrize(
    ("sizes", "rest", "expected"),
    [
        ("68,32", "%a, %b), lhs_contracting_dims={1}", True),
        ("68,1", "%a, %b), lhs_contracting_dims={1}", False),
        ("1,68", "%a, %b), lhs_contracting_dims={1}", False),
        ("68", "%a, %b), lhs_contracting_dims={1}", False),
        ("4,2,17,17", "%a, %b), lhs_batch_dims={0,1}, lhs_contracting_dims={3}", True),
        ("4,2,17,1", "%a, %b), lhs_batch_dims={0,1}, lhs_contracting_dims={3}", False),
        ("68", "%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={1}", False),
    ],
)
def test_a_product_has_rows_and_columns(sizes, rest, expected):
    assert step_profile.is_product(sizes, rest) == expected


def test_what_augments_is_no_product_with_weights():
    line = '  %dot.1 = f32[16,64]{1,0} dot(%a, %b), metadata={op_name="jit(step)/augment/dot"}'
    assert step_profile.kinds_of_program(line) == {"dot.1": "all else"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "products"),
        ("aten::bmm", "attention"),
        ("aten::_softmax_backward_data", "attention"),
        ("aten::gelu_backward", "GELU"),
        ("aten::native_layer_norm", "normalisation"),
        ("aten::_foreach_mul_", "all else"),
        ("aten::mul", "all else"),
    ],
)
def test_operations_of_the_reference_have_their_kind(name, kind):
    assert step_profile.kind_of(name, step_profile.REFERENCE) == kind


def test_a_column_adds_up_to_the_step_without_the_profiler():
    kinds = {"products": 400.0, "GELU": 20.0}
    assert step_profile.column(kinds, 500.0) == kinds | {"between": 80.0}
    assert step_profile.column(kinds, 400.0) == kinds | {"between": -20.0}


def test_the_table_has_every_kind_and_the_sums():
    ours = {"products": 1400.4, "all else": 20.2, "between": -5.0}
    rows = step_profile.table(ours, {"GELU": 10.0}).splitlines()
    titles = [row.split(" | ")[0].strip("| ") for row in rows[2:-1]]
    assert titles == list(step_profile.TITLES.values())
    assert rows[2] == "| products with weights, and what is fused into them | 1,400 | - |"
    assert rows[-2] == "| between operations, and the profiler's own | -5 | - |"
    assert rows[-1] == "| all | 1,416 | 10 |"


def test_our_step_is_profiled(cache, tmp_path):
    found = step_profile.profile_ours("quickstart", SHRINK, str(tmp_path), 2)
    assert set(found) == set(step_profile.TITLES)
    assert all(ms > 0 for kind, ms in found.items() if kind != "between")


@pytest.mark.parity
def test_the_command_prints_both(cache, monkeypatch, capfd):
    require("dinov2")
    monkeypatch.setattr(step_profile, "limit_threads", lambda _: None)  # of this process, for good
    monkeypatch.setitem(step_profile.CASES, "tiny", ("quickstart", SHRINK))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    monkeypatch.setattr("sys.argv", "step_profile --case tiny --steps 2".split())
    step_profile.main()
    header, _, *rows = capfd.readouterr().out.splitlines()
    assert header == "| ms a step | ours | reference |"
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [title for title, _, _ in cells] == [*step_profile.TITLES.values(), "all"]
    assert [title for title, *values in cells if "-" in values] == [step_profile.TITLES["scan"]]
    for column in (1, 2):
        values = [int(row[column].replace(",", "")) for row in cells if row[column] != "-"]
        assert values[-1] > 0 and abs(sum(values[:-1]) - values[-1]) <= len(values)  # rounding
