"""The comparison: what passes, what does not, and what it looks at."""

import numpy as np
import pytest

from dinov2_jax.export.check import (
    BATCHES,
    BOUND,
    ExportError,
    check,
    make_images,
    outputs_by_name,
)
from dinov2_jax.model import Model
from tests.convert.models import make_params, make_spec


@pytest.fixture(scope="module")
def model():
    spec = make_spec("registers")
    return Model(spec, make_params(spec))


def run(model, change=lambda named: named):
    """The model itself as an exported file, with a change."""

    def apply(images):
        return change({k: np.array(x) for k, x in outputs_by_name(model(images)).items()})

    return check(apply, model, height=12, width=20)


def shift(name, share):
    """Adds to one number of an output a share of the largest."""

    def change(named):
        named[name][-1, ..., 3] += share * abs(named[name]).max()
        return named

    return change


def test_the_model_itself_differs_by_nothing(model):
    assert run(model) == dict(cls=0.0, registers=0.0, patches=0.0)


@pytest.mark.parametrize("name", ["cls", "registers", "patches"])
def test_each_output_is_compared(model, name):
    differences = run(model, shift(name, BOUND / 2))
    assert differences.pop(name) == pytest.approx(BOUND / 2, rel=1e-2)
    assert set(differences.values()) == {0.0}
    with pytest.raises(ExportError, match=f"{name} 2.0e-04.* more than 1e-04"):
        run(model, shift(name, 2 * BOUND))


def test_nan_missing_and_misshapen_outputs_fail(model):
    with pytest.raises(ExportError, match="cls nan"):
        run(model, shift("cls", np.nan))
    with pytest.raises(ExportError, match=r"outputs are \{'cls': \(1, 16\), 'patches'"):
        run(model, lambda named: {k: x for k, x in named.items() if k != "registers"})
    with pytest.raises(ExportError, match="outputs are"):
        run(model, lambda named: named | {"cls": named["cls"][:, None]})


def test_a_mistake_of_the_larger_batch_alone_is_seen(model):
    """A batch that was fixed at 1 somewhere repeats the first image."""
    with pytest.raises(ExportError, match="differs"):
        run(model, lambda named: {k: np.repeat(x[:1], len(x), 0) for k, x in named.items()})
    assert len(set(BATCHES)) == 2


def test_images_look_like_photographs():
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.5, 0.6])
    images = make_images(2, 56, 84, mean=mean, std=std)
    assert images.shape == (2, 56, 84, 3)
    assert images.dtype == np.float32
    levels = (images * std + mean) * 255
    np.testing.assert_allclose(levels, levels.round(), atol=1e-3)
    assert levels.min() >= -1e-3
    assert levels.max() <= 255 + 1e-3
    assert (levels.std(axis=(1, 2)) > 8).all()  # every channel of every image has content
    steps = np.diff(levels, axis=2)
    assert (steps.std() < levels.std()).all()  # neighbouring pixels are alike
    assert not np.array_equal(images[0], images[1])
