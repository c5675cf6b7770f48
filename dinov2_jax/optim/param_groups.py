"""Which parameters learn slower, which decay, which are frozen first: by name, as static trees.

Params (or their shapes) in, three trees of the same structure out. Stacked blocks get their
layer-wise multipliers along the leading axis, so that one optimizer state serves all. Behaviour
follows dinov2/utils/param_groups.py (Apache-2.0), quirks included: the prototypes' weight_g and
the tokens do decay.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

# Parameters of the backbone's input: layer 0 of the layer-wise decay. The release of the
# reference that knows register tokens counts them in.
INPUT_NAMES = ("pos_embed", "patch_embed", "mask_token", "cls_token", "register_tokens")


class ParamGroups(NamedTuple):
    """Trees with the structure of the params."""

    lr_multiplier: Any  # float, or float64 [L, 1, ...] for stacked blocks
    wd_multiplier: Any  # 0.0 or 1.0
    is_last_layer: Any  # bool: the heads' prototypes


def parameter_groups(
    params: Any, *, layerwise_lr_decay: float = 1.0, patch_embed_lr_multiplier: float = 1.0
) -> ParamGroups:
    """Sorts the parameters of {"backbone": ..., "dino_head": ..., "ibot_head": ...}.

    With L blocks:

        lr_multiplier = layerwise_lr_decay ** (L + 1 - layer), layer 0 for the input (patch_embed,
            tokens, pos_embed), i + 1 for block i, L + 1 for the final norm and the heads;
            times patch_embed_lr_multiplier if the name contains "patch_embed"
        wd_multiplier = 0 if the name ends with "bias" or contains "norm" or "gamma", else 1
        is_last_layer = the name contains "last_layer"

    Args:
      params: nested dict of arrays or of `jax.ShapeDtypeStruct`; blocks are stacked `[L, ...]`
        under `backbone/blocks`.
      layerwise_lr_decay: 1.0: none.
      patch_embed_lr_multiplier: 0.2 in the reference.

    Returns:
      The three trees, plain numbers and numpy.
    """
    depth = _depth(params)

    def lr_multiplier(path, leaf):
        name = _name(path)
        if name.startswith("backbone/blocks/"):
            # Python's power, element by element: exactly the reference's numbers.
            by_block = [layerwise_lr_decay ** (depth - block) for block in range(depth)]
            multiplier = np.array(by_block).reshape(depth, *[1] * (leaf.ndim - 1))
        elif name.startswith("backbone/") and any(part in name for part in INPUT_NAMES):
            multiplier = layerwise_lr_decay ** (depth + 1)
        else:
            multiplier = 1.0
        return multiplier * patch_embed_lr_multiplier if "patch_embed" in name else multiplier

    def wd_multiplier(path, _):
        name = _name(path)
        return 0.0 if name.endswith("/bias") or "norm" in name or "gamma" in name else 1.0

    def is_last_layer(path, _):
        return "last_layer" in _name(path)

    return ParamGroups(
        *(
            jax.tree_util.tree_map_with_path(rule, params)
            for rule in (lr_multiplier, wd_multiplier, is_last_layer)
        )
    )


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _depth(params: Any) -> int:
    """Length of the leading axis of the stacked blocks; 0 without a backbone."""
    blocks = params.get("backbone", {}).get("blocks", {})
    depths = {leaf.shape[0] for leaf in jax.tree.leaves(blocks)}
    if len(depths) > 1:
        raise ValueError(
            f"leading axes {sorted(depths)} of backbone/blocks must be equal; stack every block "
            "parameter over the depth"
        )
    return depths.pop() if depths else 0
