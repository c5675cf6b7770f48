"""Recognising every source, and reporting everything that does not fit in one error."""

import json
import pickle

import numpy as np
import pytest

from dinov2_jax.convert import read_model
from dinov2_jax.convert.read import read_source, recognise
from dinov2_jax.convert.safetensors_file import read_safetensors, write_safetensors
from dinov2_jax.convert.state_dict import ConversionError, to_reference
from dinov2_jax.convert.write import write_model
from tests.convert.models import assert_same, make_params, make_spec
from tests.parity import require
from tests.reference.golden_values import FOLDER, arrays


def problems(flat, **known):
    with pytest.raises(ConversionError) as caught:
        recognise(flat, **known)
    return sorted(caught.value.problems)


def test_everything_is_inferred_from_shapes():
    for name in ("mlp", "swiglu", "registers"):
        spec = make_spec(name)
        source = recognise(to_reference(make_params(spec)), num_heads=2)
        found = source.spec
        facts = (
            "patch_size embed_dim depth num_heads ffn hidden_dim num_register_tokens "
            "pos_embed_grid interpolation in_channels"
        )
        for fact in facts.split():
            assert getattr(found, fact) == getattr(spec, fact), fact
        assert found.mean == (0.485, 0.456, 0.406)
        assert "does not say mean and std" in source.notes[0]


def test_heads_are_width_over_64_unless_told():
    flat = to_reference(make_params(make_spec("switch", embed_dim=128)))
    assert recognise(flat).spec.num_heads == 2
    assert any("2, width / 64, is assumed" in note for note in recognise(flat).notes)
    assert not any("heads" in note for note in recognise(flat, num_heads=4).notes)
    assert "num_heads=0 must divide the width 128; give --num-heads" in problems(flat, num_heads=0)
    assert recognise(flat, num_heads=4).spec.num_heads == 4
    assert recognise(flat, known={"num_heads": 8}).spec.num_heads == 8
    assert "num_heads=5 must divide the width 128; give --num-heads" in problems(flat, num_heads=5)


def test_interpolation_is_a_switch():
    plain, registers = (to_reference(make_params(make_spec(n))) for n in ("mlp", "registers"))
    for library, expected in {
        None: ("offset", "antialias"),
        "reference": ("offset", "antialias"),
        "huggingface": ("plain", "antialias"),
        "timm": ("antialias", "antialias"),
        "plain": ("plain", "plain"),
    }.items():
        found = tuple(
            recognise(flat, interpolation=library).spec.interpolation for flat in (plain, registers)
        )
        assert found == expected, library
    with pytest.raises(ConversionError, match="interpolation='bilinear' must be one of"):
        recognise(plain, interpolation="bilinear")


def test_all_problems_at_once():
    spec = make_spec("registers")
    flat = to_reference(make_params(spec, heads=("dino_head", "linear_head")))
    weight = flat["backbone.blocks.1.attn.qkv.weight"]
    flat["backbone.blocks.0.1.attn.qkv.weight"] = weight  # double
    flat["backbone.head.weight"] = weight  # unmatched
    flat["extra"] = weight
    del flat["backbone.norm.bias"]  # missing
    del flat["backbone.blocks.0.ls2.gamma"]
    flat["backbone.blocks.0.norm1.bias"] = np.zeros(9, np.float32)  # shapes
    flat["backbone.mask_token"] = np.zeros((1, 17), np.float32)
    flat["dino_head.mlp.2.weight"] = np.zeros((9, 8), np.float32)
    flat["dino_head.last_layer.weight_g"] = np.zeros((5, 1), np.float32)
    flat["linear_head.weight"] = np.zeros((7, 31), np.float32)
    assert problems(flat, num_heads=2) == sorted(
        [
            "backbone.blocks.0.1.attn.qkv.weight and backbone.blocks.1.attn.qkv.weight are the "
            "same parameter",
            "backbone.head.weight has no rule",
            "extra has no rule",
            "backbone.norm.bias is missing",
            "backbone.blocks.0.ls2.gamma is missing",
            "backbone/blocks/ls2/gamma has shape (1, 16), the model (2, 16)",
            "backbone.blocks.{i}.norm1.bias has several shapes: [(9,), (16,)]",
            "backbone/mask_token has shape (1, 17), the model (1, 16)",
            "dino_head/mlp/2/kernel has shape (8, 9), the model (9, 9)",
            "dino_head/last_layer/weight_g has shape (5, 1), the model (6, 1)",
            "linear_head/kernel has shape (31, 7), the model (32, 7)",
        ]
    )


def test_every_shape_is_checked():
    """One parameter of another size than all others is found, whichever it is."""
    spec = make_spec("registers_swiglu")
    flat = to_reference(make_params(spec))
    for name, array in flat.items():
        for axis in range(array.ndim):
            shape = list(array.shape)
            shape[axis] += 1
            wrong = flat | {name: np.zeros(shape, np.float32)}
            if (name, axis) in {
                ("register_tokens", 1),  # any number of registers
                ("patch_embed.proj.weight", 1),  # and of channels
            }:
                continue
            assert problems(wrong, num_heads=1), (name, axis)


def test_what_has_no_backbone():
    assert problems({}) == ["it is empty"]
    found = problems({"weight": np.zeros((5, 8)), "bias": np.zeros(5)})
    assert "backbone.weight has no rule" in found and "backbone.cls_token is missing" in found
    flat = to_reference(make_params(make_spec(), heads=("dino_head",)))
    flat = {name: array for name, array in flat.items() if name.startswith("dino_head.")}
    with pytest.raises(ConversionError, match="it has no backbone"):
        recognise(flat)


def test_a_table_that_is_not_square_needs_a_record():
    flat = to_reference(make_params(make_spec(pos_embed_grid=(2, 5))))
    (problem,) = problems(flat)
    assert problem.startswith("pos_embed has 10 positions, which is no square")
    assert recognise(flat, known={"pos_embed_grid": [2, 5]}).spec.pos_embed_grid == (2, 5)
    # A record that contradicts the shapes is not believed.
    flat = to_reference(make_params(make_spec()))
    assert recognise(flat, known={"pos_embed_grid": (2, 5)}).spec.pos_embed_grid == (3, 3)


@pytest.mark.parity
def test_training_checkpoint_of_the_reference():
    require("torch")
    spec, params = read_model(FOLDER / "teacher_checkpoint.pth", num_heads=3, with_heads=True)
    assert "in chunks" in read_source(FOLDER / "teacher_checkpoint.pth").format
    assert (spec.depth, spec.pos_embed_grid, spec.patch_size) == (4, (16, 16), 14)
    assert params.keys() == {"backbone", "dino_head", "ibot_head"}
    golden = arrays("teacher_checkpoint_outputs.npz")
    output = spec.build().apply({"params": params["backbone"]}, golden["x"].transpose(0, 2, 3, 1))
    np.testing.assert_allclose(output.cls, golden["cls"], atol=1e-5)


class TestBrokenFiles:
    """Damaged, truncated or hostile: an error that says what to do."""

    @pytest.fixture
    def flat(self):
        return to_reference(make_params(make_spec("switch")))

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="is not there"):
            read_model(tmp_path / "x.pth")
        with pytest.raises(ValueError, match=r"must be a run's workdir, a checkpoint, or a folder"):
            read_model(tmp_path)

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
    @pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
    def test_truncated(self, suffix, share, flat, tmp_path):
        path = tmp_path / f"x{suffix}"
        if suffix == ".pth":
            torch = require("torch")
            torch.save({name: torch.tensor(array) for name, array in flat.items()}, path)
        else:
            write_safetensors(path, flat, {})
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=r"must be a whole .* file.*fetch it again"):
            read_model(path)

    def test_flipped_bits_of_a_pth(self, flat, tmp_path):
        torch = require("torch")
        path = tmp_path / "x.pth"
        torch.save({name: torch.tensor(array) for name, array in flat.items()}, path)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is damaged in .*fetch it again"):
            read_model(path)

    @pytest.mark.parametrize("legacy", [True, False])
    def test_a_pickle_with_code_is_refused(self, legacy, tmp_path):
        torch = require("torch")
        path, witness = tmp_path / "x.pth", tmp_path / "witness"

        class Hostile:
            def __reduce__(self):
                return (open, (str(witness), "w"))

        torch.save({"teacher": Hostile()}, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ValueError, match="reading them could run code: refused"):
            read_model(path)
        assert not witness.exists()

    def test_a_plain_pickle(self, tmp_path):
        require("torch")
        (tmp_path / "x.pth").write_bytes(pickle.dumps({"a": 1}))
        with pytest.raises(ValueError, match="nothing else is unpickled; fetch it again"):
            read_model(tmp_path / "x.pth")

    def test_other_things_than_tensors(self, tmp_path):
        torch = require("torch")
        torch.save([1], tmp_path / "x.pth")
        with pytest.raises(ValueError, match="must hold a dict of tensors, not a list"):
            read_model(tmp_path / "x.pth")
        torch.save({"a": 1}, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=r"tensors only; \['a'\] are something else"):
            read_model(tmp_path / "x.pth")

    def test_a_record_that_is_none(self, flat, tmp_path):
        path = tmp_path / "x.safetensors"
        write_safetensors(path, flat, {"dinov2_jax.model": json.dumps({"depth": 1})})
        with pytest.raises(ValueError, match="the model's record must be what dinov2_jax wrote"):
            read_model(path)

    def test_another_kind_of_model(self, tmp_path):
        spec = make_spec("switch")
        write_model(tmp_path / "hf", spec, make_params(spec), format="hf")
        flat, _ = read_safetensors(tmp_path / "hf" / "model.safetensors")
        write_safetensors(tmp_path / "hf" / "model.safetensors", flat, {"format": "pt"})
        assert read_model(tmp_path / "hf")[0].num_heads == 4  # from config.json
        (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "vit"}))
        with pytest.raises(ValueError, match=r"model_type='vit' must be 'dinov2' or"):
            read_model(tmp_path / "hf")

    def test_orbax_that_is_damaged(self, tmp_path):
        spec = make_spec("switch")
        write_model(tmp_path / "x", spec, make_params(spec))
        (tmp_path / "x" / "params" / "_METADATA").write_text("{")
        with pytest.raises(ValueError, match="must be a whole Orbax checkpoint"):
            read_model(tmp_path / "x")
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        with pytest.raises(ValueError, match="must hold a checkpoint; it has none yet"):
            read_model(tmp_path / "run")


def test_shards_of_transformers(tmp_path):
    spec = make_spec("registers")
    params = make_params(spec)
    write_model(tmp_path / "hf", spec, params, format="hf")
    flat, _ = read_safetensors(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    names = sorted(flat)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        write_safetensors(tmp_path / "hf" / file, {n: flat[n] for n in part}, {"format": "pt"})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(read_model(tmp_path / "hf")[1], params)
