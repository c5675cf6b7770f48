"""Parameter groups: the reference's table, exactly, on stacked blocks."""

import jax
import numpy as np
import pytest

from dinov2_jax.optim.param_groups import ParamGroups, parameter_groups
from tests.parity import require
from tests.reference import golden_values

DEPTH = 4
# Our leaf names to the reference's; tokens and gammas are called the same.
TORCH_NAMES = {"kernel": "weight", "scale": "weight"}


def shape(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, np.float32)


def dense(*leading: int) -> dict:
    return {"kernel": shape(*leading, 6, 6), "bias": shape(*leading, 6)}


def norm(*leading: int) -> dict:
    return {"scale": shape(*leading, 6), "bias": shape(*leading, 6)}


def make_params(depth: int = DEPTH) -> dict:
    """Shapes of a student: a backbone with registers, and two heads."""
    head = {
        "mlp": {"0": dense(), "2": dense(), "4": dense()},
        "last_layer": {"weight_v": shape(9, 6), "weight_g": shape(9, 1)},
    }
    return {
        "backbone": {
            "cls_token": shape(1, 1, 6),
            "pos_embed": shape(1, 5, 6),
            "register_tokens": shape(1, 4, 6),
            "mask_token": shape(1, 6),
            "patch_embed": {"proj": {"kernel": shape(2, 2, 3, 6), "bias": shape(6)}},
            "blocks": {
                "norm1": norm(depth),
                "attn": {"qkv": dense(depth), "proj": dense(depth)},
                "ls1": {"gamma": shape(depth, 6)},
                "norm2": norm(depth),
                "mlp": {"fc1": dense(depth), "fc2": dense(depth)},
                "ls2": {"gamma": shape(depth, 6)},
            },
            "norm": norm(),
        },
        "dino_head": head,
        "ibot_head": head,
    }


def as_table(groups: ParamGroups, module: str) -> dict[str, tuple]:
    """{reference name: (lr multiplier, wd multiplier, is last layer)}, blocks unstacked."""
    trees = [jax.tree_util.tree_flatten_with_path(tree[module])[0] for tree in groups]
    table = {}
    for (path, lr), (_, wd), (_, last) in zip(*trees, strict=True):
        *parents, leaf = (key.key for key in path)
        names = [*parents, TORCH_NAMES.get(leaf, leaf)]
        if names[0] == "blocks":
            for block, value in enumerate(np.asarray(lr).ravel()):
                table[".".join(["blocks", str(block), *names[1:]])] = (value, wd, last)
        else:
            table[".".join(names)] = (lr, wd, last)
    return table


@pytest.mark.parametrize("module", ["backbone", "dino_head", "ibot_head"])
def test_golden_table(module):
    groups = parameter_groups(make_params(), layerwise_lr_decay=0.9, patch_embed_lr_multiplier=0.2)
    golden = golden_values.table("param_groups.json")
    key = "backbone_depth4" if module == "backbone" else "dino_head"
    want = {
        row["name"]: (row["lr_multiplier"], row["wd_multiplier"], row["is_last_layer"])
        for row in golden[f"{key}_decay0.9_patch0.2"]
    }
    assert as_table(groups, module) == want


@pytest.mark.parity
# torch's own deprecation of the weight_norm that the reference's head uses.
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("block_chunks", [0, 3])
@pytest.mark.parametrize(("decay", "patch_embed"), [(1.0, 0.2), (0.75, 1.0), (0.9, 0.2)])
def test_reference_table(decay, patch_embed, block_chunks):
    models, layers, reference = require(
        "dinov2.models.vision_transformer", "dinov2.layers", "dinov2.utils.param_groups"
    )
    backbone = models.DinoVisionTransformer(
        img_size=4,
        patch_size=2,
        embed_dim=6,
        depth=3,
        num_heads=1,
        init_values=1.0,
        block_chunks=block_chunks,
    )
    params = make_params(depth=3)
    del params["backbone"]["register_tokens"]  # the package knows none
    groups = parameter_groups(
        params, layerwise_lr_decay=decay, patch_embed_lr_multiplier=patch_embed
    )
    head = layers.DINOHead(in_dim=6, out_dim=9, hidden_dim=6, bottleneck_dim=6)
    for name, module in (("backbone", backbone), ("dino_head", head)):
        rows = reference.get_params_groups_with_decay(module, decay, patch_embed)
        want = {}
        for row in rows:
            parts = row["name"].split(".")
            if parts[0] == "blocks" and block_chunks:
                del parts[1]
            want[".".join(parts)] = (
                row["lr_multiplier"],
                row["wd_multiplier"],
                row["is_last_layer"],
            )
        assert as_table(groups, name) == want


def test_trees_fit_the_params():
    params = make_params()
    groups = parameter_groups(params, layerwise_lr_decay=0.9, patch_embed_lr_multiplier=0.2)
    for tree in groups:
        assert jax.tree.structure(tree) == jax.tree.structure(params)
    # Stacked multipliers broadcast against their parameter.
    fc1 = groups.lr_multiplier["backbone"]["blocks"]["mlp"]["fc1"]
    assert fc1["kernel"].shape == (DEPTH, 1, 1) and fc1["bias"].shape == (DEPTH, 1)


def test_heads_alone():
    params = make_params()
    del params["backbone"]
    groups = parameter_groups(params, layerwise_lr_decay=0.9)
    assert set(jax.tree.leaves(groups.lr_multiplier)) == {1.0}


def test_blocks_of_different_depth_are_refused():
    params = make_params()
    params["backbone"]["blocks"]["ls1"]["gamma"] = shape(DEPTH + 1, 6)
    with pytest.raises(ValueError, match=r"leading axes \[4, 5\] of backbone/blocks"):
        parameter_groups(params)
