"""Every format: round trips bit for bit, what is lost is named, targets appear whole or not."""

import dataclasses
import json
import os

import ml_dtypes
import numpy as np
import pytest

from dinov2_jax import beside
from dinov2_jax.convert import read_model, write_model
from dinov2_jax.convert.read import read_source
from dinov2_jax.convert.safetensors_file import open_safetensors, read_safetensors
from dinov2_jax.convert.write import resize_positions, write_source
from tests.convert.models import MODELS, assert_same, make_params, make_spec
from tests.parity import require

SUFFIX = {"orbax": "", "hf": "", "safetensors": ".safetensors", "reference": ".pth", "timm": ".pth"}
EVERY = ("orbax", "safetensors", "reference", "hf", "timm")


def need(format):
    if format in ("reference", "timm"):
        require("torch")


def as_timm_keeps(params, spec):
    """What timm holds of a backbone."""
    params = dict(params, mask_token=np.zeros_like(params["mask_token"]))
    if spec.num_register_tokens:
        table = params["pos_embed"].copy()
        params["cls_token"] = params["cls_token"] + table[:, :1]
        table[:, 0] = 0
        params["pos_embed"] = table
    return params


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("format", EVERY)
def test_ours_to_x_to_ours(format, name, tmp_path):
    need(format)
    spec = make_spec(name)
    params = make_params(spec)
    path = tmp_path / f"model{SUFFIX[format]}"
    lost = write_model(path, spec, params, format=format)
    read_spec, read = read_model(path)
    assert read_spec == spec
    if format == "timm":
        assert lost[0] == "the mask token (timm has none)"
        assert len(lost) == 1 + (spec.num_register_tokens > 0)
        params = as_timm_keeps(params, spec)
    else:
        assert lost == []
    assert_same(read, params)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("format", EVERY)
def test_x_to_ours_to_x(format, name, tmp_path):
    need(format)
    spec = make_spec(name)
    first, ours, second = (tmp_path / f"{n}{SUFFIX[format]}" for n in ("first", "ours", "second"))
    write_model(first, spec, make_params(spec), format=format)
    write_source(ours, read_source(first), format="orbax")
    write_source(second, read_source(ours), format=format)
    names = lambda path: sorted(p.name for p in path.rglob("*") if p.is_file())  # noqa: E731
    if format == "hf":
        assert names(first) == names(second)
        for file in names(first):
            if file.endswith("json"):
                assert (first / file).read_text() == (second / file).read_text()
        first, second = (path / "model.safetensors" for path in (first, second))
    if format in ("hf", "safetensors"):
        (one, header), (two, other) = (read_safetensors(path) for path in (first, second))
        assert header == other
        assert_same(one, two)
    elif format == "orbax":
        assert_same(read_model(first)[1], read_model(second)[1])
        assert (first / "model.json").read_text() == (second / "model.json").read_text()
    else:
        torch = require("torch")
        one, two = (torch.load(path, weights_only=True) for path in (first, second))
        assert_same(*({k: t.numpy() for k, t in x.items()} for x in (one, two)))


@pytest.mark.parametrize("format", ["orbax", "safetensors", "reference"])
def test_projection_heads(format, tmp_path):
    need(format)
    spec = make_spec()
    params = make_params(spec, heads=("dino_head", "ibot_head", "linear_head"))
    path = tmp_path / f"model{SUFFIX[format]}"
    assert write_model(path, spec, params, format=format) == []
    read_spec, read = read_model(path, with_heads=True)
    assert read_spec == spec
    assert_same(read, params)
    assert_same(read_model(path)[1], params["backbone"])


def test_reference_files_are_what_the_reference_loads(tmp_path):
    torch = require("torch")
    spec = make_spec("registers")
    params = make_params(spec, heads=("dino_head",))
    write_model(tmp_path / "backbone.pth", spec, params["backbone"], format="reference")
    flat = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert "blocks.1.attn.qkv.weight" in flat and "cls_token" in flat
    write_model(tmp_path / "teacher.pth", spec, params, format="reference", block_chunks=2)
    (key,) = torch.load(tmp_path / "teacher.pth", weights_only=True).items()
    assert key[0] == "teacher"
    assert "backbone.blocks.1.1.ls1.gamma" in key[1] and "dino_head.mlp.4.bias" in key[1]
    assert_same(read_model(tmp_path / "teacher.pth", with_heads=True)[1], params)
    with pytest.raises(ValueError, match=r"block_chunks=3 must be in 1\.\.2"):
        write_model(tmp_path / "x", spec, params, format="reference", block_chunks=3)
    with pytest.raises(ValueError, match="needs format='reference'"):
        write_model(tmp_path / "x", spec, params, block_chunks=2)


def test_classifier_of_transformers(tmp_path):
    spec = make_spec("registers")
    params = make_params(spec, heads=("linear_head", "dino_head"))
    lost = write_model(tmp_path / "hf", spec, params, format="hf")
    assert lost == ["dino_head (the format has no place for them)"]
    read = read_model(tmp_path / "hf", with_heads=True)[1]
    del params["dino_head"]
    assert_same(read, params)
    params["linear_head"]["kernel"] = np.zeros((80, 7), np.float32)
    with pytest.raises(ValueError, match="must be on the class token and the mean patch"):
        write_model(tmp_path / "x", spec, params, format="hf")
    assert os.listdir(tmp_path) == ["hf"]


def test_timm_loses_heads_too_and_writes_both_kinds_of_file(tmp_path):
    spec = make_spec()
    params = make_params(spec, heads=("dino_head", "linear_head"))
    path = tmp_path / "model.safetensors"
    lost = write_model(path, spec, params, format="timm")
    assert "dino_head and linear_head (the format has no place for them)" in lost
    assert "mask_token" not in open_safetensors(path)[0]
    read_spec, read = read_model(path)
    assert read_spec == spec
    assert_same(read, as_timm_keeps(params["backbone"], spec))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("format", ["safetensors", "reference", "hf", "orbax"])
def test_types_are_kept(format, dtype, tmp_path):
    need(format)
    spec = make_spec("switch")
    params = make_params(spec, dtype=dtype)
    path = tmp_path / f"model{SUFFIX[format]}"
    write_model(path, spec, params, format=format)
    assert_same(read_model(path)[1], params)


def test_other_tables_and_channels(tmp_path):
    spec = make_spec(
        "switch", pos_embed_grid=(2, 5), in_channels=5, mean=(0.5,) * 5, std=(1.0,) * 5
    )
    params = make_params(spec)
    for format in ("safetensors", "orbax"):
        path = tmp_path / f"model{SUFFIX[format]}"
        write_model(path, spec, params, format=format)
        read_spec, read = read_model(path)
        assert read_spec == spec
        assert_same(read, params)
    with pytest.raises(ValueError, match=r"pos_embed_grid=\(2, 5\) must be square: transformers"):
        write_model(tmp_path / "hf", spec, params, format="hf")
    with pytest.raises(ValueError, match=r"mlp_ratio=2\.5 must be an integer: transformers"):
        spec = make_spec("switch", hidden_dim=40)
        write_model(tmp_path / "hf", spec, make_params(spec), format="hf")
    assert not list(tmp_path.glob(".*"))


def test_positions_resized_once_give_what_is_resized_at_run_time(tmp_path):
    spec = make_spec("registers")
    params = make_params(spec)
    write_model(tmp_path / "a.safetensors", spec, params, format="safetensors")
    source = resize_positions(read_source(tmp_path / "a.safetensors"), (2, 4))
    write_source(tmp_path / "b.safetensors", source, format="safetensors")
    small_spec, small = read_model(tmp_path / "b.safetensors")
    assert small_spec == dataclasses.replace(spec, pos_embed_grid=(2, 4))
    images = np.random.default_rng(0).standard_normal((1, 8, 16, 3)).astype(np.float32)
    one = spec.build().apply({"params": params}, images)
    two = small_spec.build().apply({"params": small}, images)
    np.testing.assert_array_equal(one.patches, two.patches)


def test_facts_pass_through(tmp_path):
    spec = make_spec()
    path = tmp_path / "a.safetensors"
    params = make_params(spec)
    write_model(path, spec, params, format="safetensors", metadata={"step": "12"})
    source = read_source(path)
    assert source.metadata == {"step": "12"}
    assert write_source(tmp_path / "b.safetensors", source, format="safetensors") == []
    assert read_source(tmp_path / "b.safetensors").metadata == {"step": "12"}
    assert write_source(tmp_path / "c", source) == ["the file's facts ['step']"]


class TestTargets:
    """Nothing is replaced by accident, and nothing is left half."""

    @pytest.fixture
    def spec(self):
        return make_spec("switch")

    @pytest.mark.parametrize("format", ["orbax", "safetensors", "hf"])
    def test_existing(self, format, spec, tmp_path):
        path = tmp_path / "model"
        write_model(path, spec, make_params(spec), format=format)
        changed = dataclasses.replace(spec, num_heads=1)
        with pytest.raises(FileExistsError, match=r"is there already; --overwrite replaces it"):
            write_model(path, changed, make_params(spec), format=format)
        other = "safetensors" if format != "safetensors" else "orbax"
        with pytest.raises(FileExistsError, match="is of another kind"):
            write_model(path, changed, make_params(spec), format=other, overwrite=True)
        write_model(path, changed, make_params(spec), format=format, overwrite=True)
        if format != "safetensors":
            assert read_model(path)[0] == changed
        assert os.listdir(tmp_path) == ["model"]

    def test_a_folder_of_something_else_is_never_replaced(self, spec, tmp_path):
        (tmp_path / "photos").mkdir()
        with pytest.raises(FileExistsError, match="a folder of something else than one model"):
            write_model(tmp_path / "photos", spec, make_params(spec), overwrite=True)
        with pytest.raises(FileNotFoundError, match="must be a folder; create it"):
            write_model(tmp_path / "no" / "x", spec, make_params(spec))

    @pytest.mark.parametrize("format", ["orbax", "safetensors", "hf", "reference"])
    def test_a_failure_leaves_the_old_target(self, format, spec, tmp_path, monkeypatch):
        need(format)
        path = tmp_path / f"model{SUFFIX[format]}"
        params = make_params(spec)
        write_model(path, spec, params, format=format)

        replace = beside._replace

        def fail(written, target):
            if target == path:
                raise OSError("No space left on device")
            replace(written, target)

        # The last thing before the target changes.
        monkeypatch.setattr(beside, "_replace", fail)
        with pytest.raises(OSError, match="No space left"):
            write_model(
                path, spec, make_params(spec, dtype=np.float16), format=format, overwrite=True
            )
        assert_same(read_model(path)[1], params)
        assert os.listdir(tmp_path) == [path.name]

    def test_unknown_format_and_wrong_params(self, spec, tmp_path):
        with pytest.raises(ValueError, match=r"format='pickle' must be one of \('orbax'"):
            write_model(tmp_path / "x", spec, make_params(spec), format="pickle")
        with pytest.raises(ValueError, match="params are those of"):
            write_model(tmp_path / "x", make_spec("mlp"), make_params(spec))


def test_transformers_configuration(tmp_path):
    spec = make_spec("registers_swiglu")
    write_model(tmp_path / "hf", spec, make_params(spec), format="hf")
    model = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert model["architectures"] == ["Dinov2WithRegistersModel"]
    assert (model["image_size"], model["patch_size"], model["mlp_ratio"]) == (12, 4, 4)
    assert model["use_swiglu_ffn"] is True and model["num_register_tokens"] == 1
    processor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.1, 0.2, 0.3]
    assert processor["size"] == {"shortest_edge": 18}
    assert processor["crop_size"] == {"height": 12, "width": 12}
    assert open_safetensors(tmp_path / "hf" / "model.safetensors")[1]["format"] == "pt"
