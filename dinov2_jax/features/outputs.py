"""Which tokens to keep of a network: "cls,mean,layers=4" as a record, and as one function."""

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dinov2_jax.features.extractor import mean_patch
from dinov2_jax.model import Model

# Of the last block, and of several.
TOKENS = ("cls", "mean", "patches", "registers")
LAYERS = ("layers", "layers_patches")
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What is kept of each image. `parse_what` makes one.

    Attributes:
      tokens: among `TOKENS`, of the last block, in that order.
      layers: blocks, counted from 0, of which CLS and mean patch are kept.
      layers_patches: blocks of which the patch tokens are kept.
    """

    tokens: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    layers_patches: tuple[int, ...] = ()

    def __str__(self) -> str:
        """One spelling for all that mean the same: "cls,layers=8+9+10+11"."""
        chosen = {name: "+".join(map(str, getattr(self, name))) for name in LAYERS}
        blocks = [f"{name}={x if '+' in x else x + '+'}" for name, x in chosen.items() if x]
        return ",".join([*self.tokens, *blocks])

    def covers(self, other: "Outputs") -> bool:
        """Whether what `other` keeps is kept here too, in arrays of the same names and shapes."""
        has_tokens = set(other.tokens) <= set(self.tokens)
        return has_tokens and all(
            getattr(other, name) in ((), getattr(self, name)) for name in LAYERS
        )


def parse_what(what: str | Sequence[str], *, depth: int, num_register_tokens: int) -> Outputs:
    """Reads names of tokens.

    Args:
      what: among "cls", "mean" (of the patch tokens), "patches" and "registers", of the last
        block; "layers=BLOCKS" for CLS and mean patch of several blocks, and
        "layers_patches=BLOCKS" for their patch tokens. BLOCKS is how many of the last blocks, as
        "4", or which, counted from 0, as "2+5+8+11", or "8+" for one alone. Joined by commas, or
        a sequence of such.
      depth: blocks of the network.
      num_register_tokens: its register tokens.

    Raises:
      ValueError: an unknown name, one given twice, or what the network does not have.
    """
    items = ",".join([what] if isinstance(what, str) else what).split(",")
    found = {}
    for item in (item.strip() for item in items):
        name, _, blocks = item.partition("=")
        if name in found:
            raise ValueError(f"what={what!r} names {name} twice; name each output once")
        if name in LAYERS:
            found[name] = _parse_blocks(item, blocks, depth)
        elif item in TOKENS:
            found[name] = ()
        else:
            names = [*TOKENS, *(f"{layers}=N" for layers in LAYERS)]
            nearest = difflib.get_close_matches(item, names, n=1)
            raise ValueError(
                f"what={what!r}: {item!r} must be one of {', '.join(names)}"
                + (f"; did you mean {nearest[0]}?" if nearest else "; separate them by commas")
            )
    if "registers" in found and not num_register_tokens:
        raise ValueError("what=registers needs a model with registers; this one has none: leave it")
    return Outputs(
        tokens=tuple(name for name in TOKENS if name in found),
        **{name: found[name] for name in LAYERS if name in found},
    )


def _parse_blocks(item: str, text: str, depth: int) -> tuple[int, ...]:
    parts = [part.strip() for part in text.removesuffix("+").split("+")]
    if all(part.isdecimal() for part in parts):
        numbers = [int(part) for part in parts]
        if "+" not in text and 1 <= numbers[0] <= depth:
            return tuple(range(depth - numbers[0], depth))
        if "+" in text and len(set(numbers)) == len(numbers) and max(numbers) < depth:
            return tuple(sorted(numbers))
    raise ValueError(
        f"{item!r} must say how many of the last of {depth} blocks, as layers=4, or which, counted "
        f"from 0, as layers={'+'.join(map(str, range(min(2, depth))))} or layers={depth - 1}+"
    )


def make_compute(
    model: Model, outputs: Outputs, *, norm: bool, dtype: np.dtype
) -> Callable[[Any, jax.Array], dict[str, jax.Array]]:
    """The pure function that a `FeatureExtractor` takes.

    Args:
      model: the network.
      outputs: what to keep.
      norm: whether "layers" and "layers_patches" are taken after the final normalisation; the
        last block's tokens always are.
      dtype: of the results; means are taken in float32 before.

    Returns:
      (parameters, normalised images) -> `cls [b, d]`, `mean [b, d]`, `patches [b, n, d]`,
      `registers [b, r, d]`, `layers_cls` and `layers_mean` `[b, layers, d]` and
      `layers_patches [b, layers, n, d]`: those of `outputs`.
    """
    last = model.spec.depth - 1
    blocks = sorted({*outputs.layers, *outputs.layers_patches, *([last] if outputs.tokens else [])})

    def compute(params, images: jax.Array) -> dict[str, jax.Array]:
        found = {}
        if blocks == [last] and norm:
            of_block = {last: model.apply(params, images)}
        else:
            of_block = dict(
                zip(blocks, model.apply_layers(params, images, tuple(blocks), norm), strict=True)
            )
        if outputs.tokens:
            output = of_block[last]
            if not norm:
                output = jax.tree.map(lambda x: model.normalise(params, x), output)
            tokens = {
                "cls": output.cls,
                "mean": mean_patch(output.patches),
                "patches": output.patches,
                "registers": output.registers,
            }
            found = {name: tokens[name] for name in outputs.tokens}
        if outputs.layers:
            chosen = [of_block[i] for i in outputs.layers]
            found["layers_cls"] = jnp.stack([x.cls for x in chosen], axis=1)
            found["layers_mean"] = jnp.stack([mean_patch(x.patches) for x in chosen], axis=1)
        if outputs.layers_patches:
            chosen = [of_block[i] for i in outputs.layers_patches]
            found["layers_patches"] = jnp.stack([x.patches for x in chosen], axis=1)
        return {name: x.astype(dtype) for name, x in found.items()}

    return compute
