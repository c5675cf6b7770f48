"""`dinov2_jax.load`: every source gives one model, whose outputs are the module's."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dinov2_jax
from dinov2_jax.config import REPOSITORY
from dinov2_jax.convert import write_model
from dinov2_jax.model import Model
from dinov2_jax.models import attention
from tests.convert.models import make_params, make_spec


@pytest.fixture(scope="module")
def spec():
    return make_spec("registers", depth=3)


@pytest.fixture(scope="module")
def params(spec):
    return make_params(spec)


@pytest.fixture(scope="module")
def model(spec, params) -> Model:
    return Model(spec, params)


def images(height: int, width: int, b: int = 2) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((b, height, width, 3)).astype(np.float32)


def assert_close(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_outputs_are_the_modules(model, spec, params, monkeypatch):
    x = images(12, 20)
    out = model(x)
    assert out.cls.shape == (2, 16)
    assert out.registers.shape == (2, 4, 16)
    assert out.patches.shape == (2, 15, 16)
    assert_close(out, spec.build().apply({"params": params}, x))
    monkeypatch.setattr(attention, "FEWEST_BY_HEAD", 1)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert_close(Model(spec, params, attention="by_head")(x), out)


@pytest.mark.parametrize("n", [2, [0, 2]], ids=["last two", "chosen"])
@pytest.mark.parametrize("norm", [True, False], ids=["normalised", "as they are"])
def test_intermediate_layers_are_the_modules(model, spec, params, n, norm):
    x = images(12, 20)
    theirs = spec.build().apply({"params": params}, x, n, norm=norm, method="intermediate_layers")
    assert_close(model.intermediate_layers(x, n, norm=norm), theirs)
    grids = model.intermediate_layers(x, n, norm=norm, reshape=True)
    for ours, flat in zip(grids, theirs, strict=True):
        assert ours.patches.shape == (2, *model.grid(12, 20), 16) == (2, 3, 5, 16)
        assert_close(ours.patches[:, 1, 2], flat.patches[:, 7])
        assert_close(ours.cls, flat.cls)


def test_attention_is_the_modules(model, spec, params):
    x = images(12, 20)
    for block in (0, 2):
        theirs = spec.build().apply({"params": params}, x, block, method="cls_attention")
        assert theirs.shape == (2, 2, 1 + 4 + 15)
        np.testing.assert_allclose(model.cls_attention(x, block), theirs, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(model.cls_attention(x), model.cls_attention(x, 2))
    padded = Model(spec, params, uneven="pad").cls_attention(images(13, 22))
    assert padded.shape == (2, 2, 1 + 4 + 4 * 6)
    with pytest.raises(ValueError, match=r"block=3 must be one of 0\.\.2"):
        model.cls_attention(x, 3)


def test_uneven_sides_are_refused_padded_or_cropped(spec, params, model):
    x = images(13, 22)
    with pytest.raises(ValueError, match="height=13 and width=22 must be multiples"):
        model(x)
    # 13 -> 16: one row above, two below; 22 -> 24: one column on either side. As CenterPadding of
    # the reference's dense evaluations.
    padded = Model(spec, params, uneven="pad")
    assert padded.grid(13, 22) == (4, 6)
    assert_close(padded(x), model(np.pad(x, ((0, 0), (1, 2), (1, 1), (0, 0)))))
    cropped = Model(spec, params, uneven="crop")
    assert cropped.grid(13, 22) == (3, 5)
    assert_close(cropped(x), model(x[:, :12, 1:21]))
    (layer,) = padded.intermediate_layers(x, reshape=True)
    assert layer.patches.shape == (2, 4, 6, 16)
    for even in (padded, cropped):
        assert_close(even(x[:, :12, :20]), model(x[:, :12, :20]))
    with pytest.raises(ValueError, match="uneven='stretch' must be one of"):
        Model(spec, params, uneven="stretch")


def test_preprocessing_comes_with_the_model(model, spec):
    photo = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    batch = model.preprocess(photo)
    assert batch.shape == (1, spec.crop_size_px, spec.crop_size_px, 3)
    gray = np.full((18, 18, 3), 255, np.uint8)
    white = (1 - np.array(spec.mean)) / np.array(spec.std)
    np.testing.assert_allclose(model.preprocess(gray)[0, 0, 0], white, rtol=1e-6)
    assert model.preprocess([photo, gray]).shape == (2, 12, 12, 3)
    assert model.preprocess(photo, crop_size_px=24).shape == (1, 24, 24, 3)
    assert model.preprocess(photo, crop=False).shape == (1, 16, 24, 3)  # 18 x 24
    assert model.preprocess(photo, resize_size_px=12, crop=False).shape == (1, 12, 16, 3)
    assert np.isfinite(model(batch).cls).all()
    for sizes in ({"crop_size_px": 0}, {"crop_size_px": -4}, {"resize_size_px": 0}):
        ((name, size),) = sizes.items()
        with pytest.raises(ValueError, match=f"{name}={size} must be at least 1"):
            model.preprocess(photo, **sizes)


def test_half_precision_is_the_modules_too(spec, params):
    x = images(12, 12)
    half = Model(spec, params, dtype="bfloat16")
    assert half.params["blocks"]["mlp"]["fc1"]["kernel"].dtype == jnp.bfloat16
    assert half.params["norm"]["scale"].dtype == jnp.float32
    out = half(x)
    assert out.cls.dtype == jnp.bfloat16
    theirs = jax.jit(spec.build(dtype=jnp.bfloat16).apply)({"params": params}, x)
    np.testing.assert_array_equal(*(np.asarray(o.patches, np.float32) for o in (out, theirs)))


def test_wrong_arrays_are_refused(model):
    with pytest.raises(ValueError, match=r"must be \[b, height, width, c\], not \[12, 12, 3\]"):
        model(images(12, 12)[0])
    with pytest.raises(ValueError, match="must be normalised floats, not uint8"):
        model.intermediate_layers(np.zeros((1, 12, 12, 3), np.uint8))
    with pytest.raises(ValueError, match="4 channels but in_channels=3"):
        model(np.zeros((1, 12, 12, 4), np.float32))
    with pytest.raises(ValueError, match=r"must be different blocks of 0\.\.2"):
        model.intermediate_layers(images(12, 12), [3])
    with pytest.raises(
        ValueError, match=r"at least one, of a patch of 4 px .*not \[0, 12, 12, 3\]"
    ):
        model(images(12, 12, b=0))


def test_sides_below_a_patch_are_refused_where_nothing_would_be_left(spec, params):
    with pytest.raises(ValueError, match=r"a patch of 4 px or more a side, not \[2, 12, 3, 3\]"):
        Model(spec, params, uneven="crop")(images(12, 3))
    assert Model(spec, params, uneven="pad")(images(12, 3)).patches.shape == (2, 3, 16)


def test_blocks_may_be_numbers_of_numpy(model):
    x = images(12, 12)
    assert_close(model.intermediate_layers(x, np.int64(2)), model.intermediate_layers(x, 2))
    assert_close(model.intermediate_layers(x, np.arange(2)), model.intermediate_layers(x, [0, 1]))


def test_attention_that_the_device_has_not_is_refused_when_loading(spec, params):
    with pytest.raises(ValueError, match="attention='cudnn' needs a GPU and bfloat16, not cpu"):
        Model(spec, params, attention="cudnn", dtype="bfloat16")


@pytest.mark.parametrize("format", ["safetensors", "orbax", "hf"])
def test_load_reads_every_format(model, spec, params, tmp_path, format):
    path = tmp_path / ("m.safetensors" if format == "safetensors" else "m")
    write_model(path, spec, params, format=format)
    loaded = dinov2_jax.load(path)
    assert loaded.spec == spec
    x = images(12, 20)
    assert_close(loaded(x), model(x))


def test_load_reads_a_run(finished):
    teacher, student = (dinov2_jax.load(finished, tree=tree) for tree in ("teacher", "student"))
    x = teacher.preprocess(np.zeros((40, 40, 3), np.uint8))
    assert not np.array_equal(teacher(x).cls, student(x).cls)
    assert_close(dinov2_jax.load(finished / "teacher.safetensors")(x), teacher(x))


def test_a_wrong_name_names_the_nearest():
    with pytest.raises(FileNotFoundError, match="did you mean dinov2_vits14"):
        dinov2_jax.load("dinov2_vits")


def test_loading_needs_little(spec, params, tmp_path):
    """Neither training nor evaluation, nor any other package than those of the core's features."""
    path = tmp_path / "m.safetensors"
    write_model(path, spec, params, format="safetensors")
    program = f"""
import sys, time
class Refuse:
    names = {{"torch", "transformers", "orbax", "tensorstore", "grain", "optax", "ml_collections",
             "tensorboardX", "wandb", "sklearn", "skimage", "scipy", "rich.progress"}}
    def find_spec(self, name, path=None, target=None):
        assert name not in self.names, name
sys.meta_path.insert(0, Refuse())
import dinov2_jax
assert not {{"jax", "numpy", "flax"}} & set(sys.modules)
import numpy as np
model = dinov2_jax.load({str(path)!r})
print(model(model.preprocess(np.zeros((20, 20, 3), np.uint8))).cls.shape)
"""
    # jax itself imports scipy where it is there.
    program = program.replace('"scipy", ', "")
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.replace("(", "[").replace(")", "]")) == [1, 16]
