"""Conversion to and from the reference's names: tables, exact round trips, every kind of error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax.convert.state_dict import ConversionError, from_reference, to_reference
from dinov2_jax.models.heads import DINOHead
from dinov2_jax.models.vit import VARIANTS, VisionTransformer
from tests.parity import require
from tests.reference.golden_values import FOLDER, arrays


def reference_table(d, depth, ffn, registers, positions=1370):
    """Names and shapes of a released backbone."""
    table = {"cls_token": (1, 1, d), "pos_embed": (1, positions, d)}
    if registers:
        table["register_tokens"] = (1, registers, d)
    table |= {"mask_token": (1, d)}
    table |= {"patch_embed.proj.weight": (d, 3, 14, 14), "patch_embed.proj.bias": (d,)}
    hidden = {"mlp": 4 * d, "swiglu": {384: 1024, 768: 2048, 1024: 2736, 1536: 4096}[d]}[ffn]
    first, second, width = ("fc1", "fc2", 1) if ffn == "mlp" else ("w12", "w3", 2)
    for i in range(depth):
        block = {
            "norm1.weight": (d,),
            "norm1.bias": (d,),
            "attn.qkv.weight": (3 * d, d),
            "attn.qkv.bias": (3 * d,),
            "attn.proj.weight": (d, d),
            "attn.proj.bias": (d,),
            "ls1.gamma": (d,),
            "norm2.weight": (d,),
            "norm2.bias": (d,),
            f"mlp.{first}.weight": (width * hidden, d),
            f"mlp.{first}.bias": (width * hidden,),
            f"mlp.{second}.weight": (d, hidden),
            f"mlp.{second}.bias": (d,),
            "ls2.gamma": (d,),
        }
        table |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return table | {"norm.weight": (d,), "norm.bias": (d,)}


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_of_the_released_backbones(variant, registers):
    sizes = VARIANTS[variant]
    model = VisionTransformer(
        patch_size=14, pos_embed_grid=(37, 37), num_register_tokens=registers, **sizes
    )
    images = jax.ShapeDtypeStruct((1, 14, 14, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    # One number stands for all: views of it have the shapes, but no memory.
    params = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes)
    flat = to_reference(params)
    expected = reference_table(sizes["embed_dim"], sizes["depth"], sizes["ffn"], registers)
    assert {name: array.shape for name, array in flat.items()} == expected
    assert list(flat) == list(expected), "the reference's order"


def make_params(*, swiglu=False, registers=0, heads=True, **settings):
    """Random parameters of a tiny network, as our tree."""
    sizes = dict(patch_size=4, embed_dim=8, depth=11, num_heads=2, pos_embed_grid=(3, 3))
    backbone = VisionTransformer(
        **(sizes | settings), ffn="swiglu" if swiglu else "mlp", num_register_tokens=registers
    )
    head = DINOHead(num_prototypes=6, hidden_dim=5, bottleneck_dim=3)
    modules = {"backbone": (backbone, jnp.zeros((1, 8, 8, 3)))}
    if heads:
        modules |= {name: (head, jnp.zeros((1, 8))) for name in ("dino_head", "ibot_head")}
    rng = np.random.default_rng(0)
    return {
        name: jax.tree.map(
            lambda s: rng.standard_normal(s.shape).astype(np.float32),
            jax.eval_shape(module.init, jax.random.key(0), x)["params"],
        )
        for name, (module, x) in modules.items()
    }


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("settings", [{}, dict(swiglu=True, registers=2), dict(heads=False)])
def test_round_trips_are_exact(settings):
    params = make_params(**settings)
    flat = to_reference(params)
    assert all(name.split(".")[0] in params for name in flat)
    back = from_reference(flat, template=params)
    assert_same(back, params)
    again = to_reference(back)
    assert list(again) == list(flat)
    for name, array in flat.items():
        np.testing.assert_array_equal(again[name], array, strict=True)


def test_layouts():
    params = make_params()["backbone"]
    flat = to_reference(params)
    blocks = params["blocks"]
    # Block 10 comes after block 9, not after block 1.
    np.testing.assert_array_equal(
        flat["blocks.10.mlp.fc1.weight"], blocks["mlp"]["fc1"]["kernel"][10].T
    )
    np.testing.assert_array_equal(flat["blocks.2.norm2.weight"], blocks["norm2"]["scale"][2])
    kernel = params["patch_embed"]["proj"]["kernel"]
    np.testing.assert_array_equal(
        flat["patch_embed.proj.weight"][5, 2, 1, 3], kernel[1, 3, 2, 5], strict=True
    )


def test_bare_backbone_and_type():
    params = make_params()["backbone"]
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    flat = to_reference(params)
    assert "cls_token" in flat
    assert flat["cls_token"].dtype == jnp.bfloat16
    back = from_reference(flat)
    assert_same(back, jax.tree.map(np.asarray, params))


def chunk(flat, size=6):
    """The names of a training checkpoint: `blocks.{chunk}.{i}`."""

    def rename(name):
        prefix, _, rest = name.partition("blocks.")
        return f"{prefix}blocks.{int(rest.split('.')[0]) // size}.{rest}" if rest else name

    return {rename(name): array for name, array in flat.items()}


def test_chunked_names_are_flattened():
    params = make_params()
    chunked = chunk(to_reference(params))
    assert "backbone.blocks.1.10.ls1.gamma" in chunked
    assert_same(from_reference(chunked, template=params), params)


class TestErrors:
    """Everything that does not fit is in one error."""

    def problems(self, flat, template=None):
        with pytest.raises(ConversionError) as caught:
            from_reference(flat, template=template)
        for problem in caught.value.problems:
            assert problem in str(caught.value)
        return caught.value.problems

    def test_all_at_once(self):
        flat = to_reference(make_params())
        weight = flat["backbone.blocks.3.attn.qkv.weight"]
        flat["backbone.blocks.0.3.attn.qkv.weight"] = weight  # double
        flat["backbone.head.weight"] = weight  # unmatched, in a module
        flat["extra"] = weight  # unmatched, out of any
        flat["dino_loss.center"] = weight
        del flat["backbone.norm.bias"]  # missing
        del flat["backbone.blocks.4.ls1.gamma"]  # missing in one block
        del flat["ibot_head.last_layer.weight_g"]
        flat["backbone.blocks.5.norm1.bias"] = np.zeros(9, np.float32)  # another shape
        flat["backbone.patch_embed.proj.weight"] = np.zeros((8, 48), np.float32)  # other axes
        assert sorted(self.problems(flat)) == sorted(
            [
                "backbone.blocks.0.3.attn.qkv.weight and backbone.blocks.3.attn.qkv.weight are "
                "the same parameter",
                "backbone.head.weight has no rule",
                "extra has no rule",
                "dino_loss.center has no rule",
                "backbone.norm.bias is missing",
                "backbone.blocks.4.ls1.gamma is missing",
                "ibot_head.last_layer.weight_g is missing",
                "backbone.blocks.{i}.norm1.bias has several shapes: [(8,), (9,)]",
                "backbone.patch_embed.proj.weight has shape (8, 48), not d c p1 p2 -> p1 p2 c d",
            ]
        )

    def test_both_ffns_or_none(self):
        flat = to_reference(make_params(heads=False)["backbone"])
        mlp = {name: array for name, array in flat.items() if ".mlp." in name}
        for name in mlp:
            del flat[name]
        expected = ": exactly one of ['ffn=mlp', 'ffn=swiglu'] must be there, not "
        assert self.problems(flat) == [expected + "[]"]
        swiglu = to_reference(make_params(heads=False, swiglu=True)["backbone"])
        assert self.problems(swiglu | mlp) == [expected + "['ffn=mlp', 'ffn=swiglu']"]

    def test_half_an_ffn(self):
        flat = to_reference(make_params(heads=False)["backbone"])
        flat = {name: array for name, array in flat.items() if "fc2" not in name}
        assert self.problems(flat) == [
            "blocks.{i}.mlp.fc2.weight is missing",
            "blocks.{i}.mlp.fc2.bias is missing",
        ]

    def test_blocks_without_their_first(self):
        flat = to_reference(make_params(heads=False)["backbone"])
        flat = {name: array for name, array in flat.items() if "blocks.0." not in name}
        problems = self.problems(flat)
        assert len(problems) == 14
        assert "blocks.0.mlp.fc1.bias is missing" in problems

    def test_template(self):
        flat = to_reference(make_params(heads=False, registers=2))
        template = make_params(pos_embed_grid=(4, 4), depth=10)
        problems = self.problems(flat, template)
        assert "backbone/register_tokens is not in the model" in problems
        assert "dino_head/mlp/0/kernel of the model has no source" in problems
        assert "backbone/pos_embed has shape (1, 10, 8), the model (1, 17, 8)" in problems
        assert "backbone/blocks/ls1/gamma has shape (11, 8), the model (10, 8)" in problems

    def test_empty(self):
        assert self.problems({}) == ["it is empty"]

    def test_to_reference(self):
        params = make_params()
        del params["backbone"]["norm"]["scale"]
        params["backbone"]["blocks"]["ls1"]["gamma"] = np.zeros((7, 8))
        params["backbone"]["blocks"]["ls3"] = {"gamma": np.zeros((11, 8))}
        params["ibot_head"]["mlp"]["0"]["kernel"] = np.zeros(3)
        params["koleo_head"] = {}
        with pytest.raises(ConversionError, match="cannot name these parameters: 5 problem") as e:
            to_reference(params)
        text = str(e.value)
        assert "backbone/norm/scale is missing" in text
        assert "backbone/blocks/ls3/gamma has no rule" in text
        assert "koleo_head has no rule" in text
        assert "blocks are not stacked to one depth: {" in text
        assert "'backbone/blocks/ls1/gamma': (7,)" in text
        assert "ibot_head/mlp/0/kernel has shape (3,), from outputs inputs ->" in text


@pytest.mark.parity
def test_training_checkpoint_of_the_reference():
    torch = require("torch")
    checkpoint = torch.load(FOLDER / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    assert "backbone.blocks.1.3.attn.qkv.weight" in checkpoint
    params = from_reference({name: tensor.numpy() for name, tensor in checkpoint.items()})
    backbone = VisionTransformer(
        patch_size=14, embed_dim=48, depth=4, num_heads=3, pos_embed_grid=(16, 16)
    )
    golden = arrays("teacher_checkpoint_outputs.npz")
    output = jax.jit(backbone.apply)(
        {"params": params["backbone"]}, golden["x"].transpose(0, 2, 3, 1)
    )
    head = lambda bottleneck: DINOHead(256, hidden_dim=64, bottleneck_dim=bottleneck)  # noqa: E731
    dino = head(32).apply({"params": params["dino_head"]}, output.cls)
    ibot = head(16).apply({"params": params["ibot_head"]}, output.patches[:, :9])
    for ours, name in (
        (output.cls, "cls"),
        (output.patches[:, ::7], "patches_every7"),
        (dino, "dino_logits"),
        (ibot, "ibot_logits_first9"),
    ):
        error = np.abs(np.asarray(ours) - golden[name]).max() / np.abs(golden[name]).max()
        assert error < 5e-6, f"{name}: {error}"  # float32 sums in another order


@pytest.mark.parity
def test_live_reference_modules_load_what_we_write():
    torch, reference = require("torch", "dinov2.models.vision_transformer")
    flat = to_reference(make_params(embed_dim=8, depth=3, swiglu=True)["backbone"])
    module = reference.DinoVisionTransformer(
        img_size=12,
        patch_size=4,
        embed_dim=8,
        depth=3,
        num_heads=2,
        ffn_layer="swiglu",
        init_values=1.0,
        block_chunks=0,
    )
    tensors = {name: torch.tensor(np.ascontiguousarray(a)) for name, a in flat.items()}
    module.load_state_dict(tensors, strict=True)
    assert list(module.state_dict()) == list(flat)
    np.testing.assert_array_equal(
        module.blocks[2].mlp.w12.weight.detach().numpy(), flat["blocks.2.mlp.w12.weight"]
    )
