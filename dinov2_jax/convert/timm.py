"""timm's names: `vit_*_patch14_dinov2` and `_reg4_dinov2`, to and from the reference's.

timm has no mask token, calls the parts of SwiGLU fc1 and fc2, and keeps no CLS position in models
with registers: it is added to the CLS token. Behaviour follows the checkpoint filter in timm's
models/vision_transformer.py (Apache-2.0). Numpy only.
"""

from collections.abc import Mapping

import numpy as np

from dinov2_jax.convert.lazy import Arrays, LazyArray

SWIGLU = {".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."}


def from_timm(flat: Mapping[str, Arrays]) -> dict[str, Arrays]:
    """The reference's names for timm's; names unknown to timm stay, for the error.

    The mask token, which only training needs, is zero. With registers the CLS position is zero.
    """
    first, second = (
        flat.get(f"blocks.0.mlp.{name}.weight", np.empty((0, 0))).shape for name in ("fc1", "fc2")
    )
    is_swiglu = len(first) == len(second) == 2 and first[0] == 2 * second[1] > 0
    named = {}
    for name, array in flat.items():
        if is_swiglu:
            for ours, theirs in SWIGLU.items():
                name = name.replace(theirs, ours)
        named["register_tokens" if name == "reg_token" else name] = array
    cls, table = named.get("cls_token"), named.get("pos_embed")
    if cls is None or table is None or len(table.shape) != 3:
        return named
    d = cls.shape[-1]
    named.setdefault("mask_token", np.zeros((1, d), cls.dtype))
    if "register_tokens" in named:
        _, n, _ = table.shape
        named["pos_embed"] = LazyArray(
            (1, 1 + n, d),
            table.dtype,
            lambda: np.concatenate([np.zeros((1, 1, d), table.dtype), np.asarray(table)], axis=1),
        )
    return named


def to_timm(flat: Mapping[str, Arrays]) -> tuple[dict[str, Arrays], list[str]]:
    """timm's names for the reference's, of a backbone alone; and what is lost, in words."""
    lost = ["the mask token (timm has none)"]
    named = {}
    for name, array in flat.items():
        for ours, theirs in SWIGLU.items():
            name = name.replace(ours, theirs)
        if name != "mask_token":
            named["reg_token" if name == "register_tokens" else name] = array
    if "reg_token" in named:
        cls, table = (np.asarray(named[name]) for name in ("cls_token", "pos_embed"))
        position = table[:, :1]
        # An addition of zero would turn -0 into 0.
        named["cls_token"] = cls + position if position.any() else cls
        named["pos_embed"] = table[:, 1:]
        lost.append("the CLS position as a number of its own (timm adds it to the CLS token)")
    return named, lost
