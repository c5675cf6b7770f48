"""What to keep: how it is written, and that every kind is the model's own."""

import jax
import numpy as np
import pytest

from dinov2_jax.features.outputs import DTYPES, Outputs, make_compute, parse_what

NETWORK = dict(depth=12, num_register_tokens=4)


@pytest.mark.parametrize(
    ("what", "expected", "text"),
    [
        ("cls", Outputs(("cls",)), "cls"),
        (" mean , cls", Outputs(("cls", "mean")), "cls,mean"),
        (["registers", "patches"], Outputs(("patches", "registers")), "patches,registers"),
        ("layers=4,cls", Outputs(("cls",), (8, 9, 10, 11)), "cls,layers=8+9+10+11"),
        ("layers=11+8+2+5", Outputs((), (2, 5, 8, 11)), "layers=2+5+8+11"),
        ("layers=8+", Outputs((), (8,)), "layers=8+"),
        ("layers=1", Outputs((), (11,)), "layers=11+"),
        ("layers_patches=0+,layers=12", Outputs((), tuple(range(12)), (0,)), None),
    ],
)
def test_one_record_for_all_spellings(what, expected, text):
    found = parse_what(what, **NETWORK)
    assert found == expected
    assert text is None or str(found) == text
    assert parse_what(str(found), **NETWORK) == found


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("patch", "'patch' must be one of cls, mean, patches, .*; did you mean patches"),
        ("", "'' must be one of"),
        ("cls,mean,cls", "names cls twice"),
        ("cls=3", "'cls=3' must be one of"),
        ("layers", "'layers' must say how many of the last of 12 blocks"),
        ("layers=0", "'layers=0' must say"),
        ("layers=13", "'layers=13' must say"),
        ("layers=3+12", r"counted from 0, as layers=0\+1 or layers=11\+"),
        ("layers=3+3", "must say"),
        ("layers=-1", "must say"),
        ("layers=+", "must say"),
    ],
)
def test_errors(what, message):
    with pytest.raises(ValueError, match=message):
        parse_what(what, **NETWORK)


def test_registers_need_a_model_that_has_them():
    with pytest.raises(ValueError, match="needs a model with registers"):
        parse_what("cls,registers", depth=12, num_register_tokens=0)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 12, 20, 3)).astype(np.float32)


def compute(model, what, images, *, norm=True, dtype="float32"):
    outputs = parse_what(what, depth=3, num_register_tokens=4)
    found = jax.jit(make_compute(model, outputs, norm=norm, dtype=DTYPES[dtype]))
    return found(model.params, images)


@pytest.mark.parametrize("norm", [True, False], ids=["normalised", "as they are"])
def test_every_kind_is_the_models_own(model, images, norm):
    what = "cls,mean,patches,registers,layers=0+2,layers_patches=1+"
    found = compute(model, what, images, norm=norm)
    last = model(images)
    layers = model.intermediate_layers(images, 3, norm=norm)
    chosen = [layers[0], layers[2]]
    expected = {
        "cls": last.cls,
        "mean": last.patches.mean(axis=1),
        "patches": last.patches,
        "registers": last.registers,
        "layers_cls": np.stack([x.cls for x in chosen], axis=1),
        "layers_mean": np.stack([x.patches.mean(axis=1) for x in chosen], axis=1),
        "layers_patches": layers[1].patches[:, None],
    }
    assert found.keys() == expected.keys()
    assert found["layers_patches"].shape == (2, 1, 15, 16)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("what", ["cls", "layers=1", "layers_patches=0+", "patches,registers"])
def test_any_part_is_what_it_is_in_the_whole(model, images, what):
    whole = compute(model, "cls,patches,registers,layers=1,layers_patches=0+", images)
    for name, array in compute(model, what, images).items():
        np.testing.assert_allclose(array, whole[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_rounded_once_at_the_end(model, images, dtype):
    exact = compute(model, "mean,layers=1", images)
    for name, array in compute(model, "mean,layers=1", images, dtype=dtype).items():
        assert array.dtype == DTYPES[dtype]
        expected = np.asarray(exact[name]).astype(DTYPES[dtype])
        bits = {np.dtype(dtype): f"u{np.dtype(dtype).itemsize}" for dtype in DTYPES.values()}
        np.testing.assert_array_equal(
            np.asarray(array).view(bits[array.dtype]), expected.view(bits[array.dtype])
        )


def test_what_covers_what():
    def outputs(what):
        return parse_what(what, depth=6, num_register_tokens=0)

    more = outputs("cls,mean,layers=2")
    for what in ("cls", "mean", "layers=2", "layers=4+5", "cls,mean,layers=2"):
        assert more.covers(outputs(what))
    for what in ("patches", "layers=1", "layers=3", "layers_patches=2", "cls,patches"):
        assert not more.covers(outputs(what))
