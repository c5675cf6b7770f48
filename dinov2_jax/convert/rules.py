"""The table that maps the reference's parameter names and layouts to ours.

Our trees carry the reference's names (see `dinov2_jax.models.vit`), so a rule is needed only for
the words that differ (weight: kernel or scale), the order of axes, and the stack of blocks. Facts:
dinov2/models/vision_transformer.py, dinov2/layers/*.py (Apache-2.0). `state_dict` is the engine.
"""

import dataclasses

# Layouts, as einops patterns from the reference's axes to ours.
SAME = ""
LINEAR = "outputs inputs -> inputs outputs"
PATCHES = "d c p1 p2 -> p1 p2 c d"


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of the table.

    Attributes:
      reference: name in a state dict; `{i}` stands for a block's index, `{j}` for any number.
      ours: path in our tree; blocks are stacked on axis 0 in the order of `{i}`, `{j}` is kept.
      layout: how axes move, or `SAME`.
      option: "" if every model has this parameter; else "NAME" or "NAME=VALUE". A model has all
        parameters of an option or none; of options "NAME=.." it has exactly one.
    """

    reference: str
    ours: str
    layout: str = SAME
    option: str = ""

    @property
    def is_stacked(self) -> bool:
        """Whether there is one per block."""
        return "{i}" in self.reference


def _linear(reference: str, ours: str, option: str = "") -> tuple[Rule, Rule]:
    return (
        Rule(f"{reference}.weight", f"{ours}/kernel", LINEAR, option),
        Rule(f"{reference}.bias", f"{ours}/bias", SAME, option),
    )


def _norm(reference: str, ours: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{reference}.weight", f"{ours}/scale"),
        Rule(f"{reference}.bias", f"{ours}/bias"),
    )


# In the order of the reference's state dict.
BACKBONE = (
    Rule("cls_token", "cls_token"),
    Rule("pos_embed", "pos_embed"),
    Rule("register_tokens", "register_tokens", option="registers"),
    Rule("mask_token", "mask_token"),
    Rule("patch_embed.proj.weight", "patch_embed/proj/kernel", PATCHES),
    Rule("patch_embed.proj.bias", "patch_embed/proj/bias"),
    *_norm("blocks.{i}.norm1", "blocks/norm1"),
    *_linear("blocks.{i}.attn.qkv", "blocks/attn/qkv"),
    *_linear("blocks.{i}.attn.proj", "blocks/attn/proj"),
    Rule("blocks.{i}.ls1.gamma", "blocks/ls1/gamma"),
    *_norm("blocks.{i}.norm2", "blocks/norm2"),
    *_linear("blocks.{i}.mlp.fc1", "blocks/mlp/fc1", "ffn=mlp"),
    *_linear("blocks.{i}.mlp.fc2", "blocks/mlp/fc2", "ffn=mlp"),
    *_linear("blocks.{i}.mlp.w12", "blocks/mlp/w12", "ffn=swiglu"),
    *_linear("blocks.{i}.mlp.w3", "blocks/mlp/w3", "ffn=swiglu"),
    Rule("blocks.{i}.ls2.gamma", "blocks/ls2/gamma"),
    *_norm("norm", "norm"),
)

# The MLP of a head with one layer is that layer, without a number.
HEAD = (
    *_linear("mlp.{j}", "mlp/{j}", "layers=several"),
    *_linear("mlp", "mlp", "layers=one"),
    Rule("last_layer.weight_g", "last_layer/weight_g"),
    Rule("last_layer.weight_v", "last_layer/weight_v"),
)

# A classifier on the class token and the mean patch; its name is that of dinov2/hub/classifiers.py.
LINEAR_HEAD = (
    Rule("weight", "kernel", LINEAR),
    Rule("bias", "bias"),
)

MODULES = {
    "backbone": BACKBONE,
    "dino_head": HEAD,
    "ibot_head": HEAD,
    "linear_head": LINEAR_HEAD,
}
