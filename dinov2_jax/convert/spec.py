"""What a model is, besides its numbers: sizes, rules and preprocessing, as one small record.

Inferred from shapes; what shapes do not tell (heads, interpolation, preprocessing) comes from the
file, or from the released models' conventions. Every file that we write carries it as JSON.
Numpy only. Shapes: dinov2/models/vision_transformer.py (Apache-2.0).
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

# The key of a spec among the facts in a file's header, and its file in a folder.
METADATA_KEY = "dinov2_jax.model"
SPEC_FILE = "model.json"

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# How each library resizes positions: of backbones without registers, and with them.
INTERPOLATION_OF = {
    "reference": ("offset", "antialias"),
    "huggingface": ("plain", "antialias"),
    "timm": ("antialias", "antialias"),
}
INTERPOLATIONS = ("offset", "plain", "antialias")

# Width, blocks, feed-forward network of the released sizes (dinov2/hub/backbones.py).
RELEASED = {
    (384, 12, "mlp"): "vit_small",
    (768, 12, "mlp"): "vit_base",
    (1024, 24, "mlp"): "vit_large",
    (1536, 40, "swiglu"): "vit_giant2",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A backbone without its weights.

    Attributes:
      patch_size: side of a patch in pixels.
      embed_dim: width `d`.
      depth: blocks.
      num_heads: attention heads.
      ffn: "mlp" or "swiglu".
      hidden_dim: width inside the feed-forward network (of SwiGLU: of the gate).
      num_register_tokens: `r`.
      pos_embed_grid: rows and columns of the stored position table, in patches.
      interpolation: how it is resized: one of `INTERPOLATIONS`.
      in_channels: `c`.
      mean, std: of pixels in [0, 1], one per channel.
      resize_size_px: short side of an image before the crop.
      crop_size_px: side of the centred crop that evaluation uses.
    """

    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    ffn: str
    hidden_dim: int
    num_register_tokens: int
    pos_embed_grid: tuple[int, int]
    interpolation: str
    in_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_size_px: int = 256
    crop_size_px: int = 224

    @property
    def variant(self) -> str:
        """`vit_small`, `vit_base`, `vit_large` or `vit_giant2`; other sizes are "custom"."""
        return RELEASED.get((self.embed_dim, self.depth, self.ffn), "custom")

    @property
    def mlp_ratio(self) -> float:
        """The `mlp_ratio` that gives `hidden_dim`.

        Raises:
          ValueError: none does.
        """
        from dinov2_jax.models.layers import ffn_hidden_dim

        share = {"mlp": 1.0, "swiglu": 1.5}[self.ffn] * self.hidden_dim / self.embed_dim
        for ratio in (4.0, round(share), share, share + 1e-6):
            if ffn_hidden_dim(self.embed_dim, ratio, self.ffn) == self.hidden_dim:
                return float(ratio)
        raise ValueError(
            f"hidden_dim={self.hidden_dim} of a {self.ffn} network of width {self.embed_dim} must "
            "follow from a ratio (SwiGLU: a multiple of 8); it does not, so it cannot be built"
        )

    def build(self, **settings):
        """The `VisionTransformer`; `settings` are others of its attributes, such as dtype."""
        from dinov2_jax.models.vit import VisionTransformer

        names = (
            "patch_size embed_dim depth num_heads ffn mlp_ratio num_register_tokens "
            "pos_embed_grid interpolation in_channels"
        )
        return VisionTransformer(
            **{name: getattr(self, name) for name in names.split()}, **settings
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path in our tree -> shape, of every parameter of the backbone."""
        d, hidden, p = self.embed_dim, self.hidden_dim, self.patch_size
        linears = {"attn/qkv": (d, 3 * d), "attn/proj": (d, d)}
        if self.ffn == "mlp":
            linears |= {"mlp/fc1": (d, hidden), "mlp/fc2": (hidden, d)}
        else:
            linears |= {"mlp/w12": (d, 2 * hidden), "mlp/w3": (hidden, d)}
        block = {
            f"{name}/{leaf}": (d,) for name in ("norm1", "norm2") for leaf in ("scale", "bias")
        }
        block |= {f"{name}/gamma": (d,) for name in ("ls1", "ls2")}
        block |= {f"{name}/kernel": shape for name, shape in linears.items()}
        block |= {f"{name}/bias": shape[1:] for name, shape in linears.items()}
        registers = {"register_tokens": (1, self.num_register_tokens, d)}
        return {
            "cls_token": (1, 1, d),
            "pos_embed": (1, 1 + math.prod(self.pos_embed_grid), d),
            **(registers if self.num_register_tokens else {}),
            "mask_token": (1, d),
            "patch_embed/proj/kernel": (p, p, self.in_channels, d),
            "patch_embed/proj/bias": (d,),
            **{f"blocks/{name}": (self.depth, *shape) for name, shape in block.items()},
            "norm/scale": (d,),
            "norm/bias": (d,),
        }

    @property
    def num_params(self) -> int:
        """Parameters of the backbone."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def describe(self) -> str:
        """One line for people."""
        rows, cols = self.pos_embed_grid
        return (
            f"{self.variant}/{self.patch_size}: {self.depth} blocks of width {self.embed_dim}, "
            f"{self.num_heads} heads, {self.ffn} {self.hidden_dim}, {self.num_register_tokens} "
            f"registers, positions {rows} x {cols} ({self.interpolation}), "
            f"{self.num_params:,} parameters"
        )

    def to_json(self) -> str:
        """For a file; `from_json` reads it. `variant` is there for people."""
        return json.dumps({"variant": self.variant, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> "ModelSpec":
        """Reads `to_json`.

        Raises:
          ValueError: it is something else.
        """
        try:
            facts = json.loads(text)
            facts.pop("variant", None)
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()})
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"the model's record must be what dinov2_jax wrote ({error}); convert its source "
                "again"
            ) from error

    @classmethod
    def from_module(cls, module, **preprocessing) -> "ModelSpec":
        """The spec of a `VisionTransformer`; `preprocessing`: mean, std, sizes in pixels."""
        from dinov2_jax.models.layers import ffn_hidden_dim

        names = (
            "patch_size embed_dim depth num_heads ffn num_register_tokens interpolation in_channels"
        )
        return cls(
            **{name: getattr(module, name) for name in names.split()},
            hidden_dim=ffn_hidden_dim(module.embed_dim, module.mlp_ratio, module.ffn),
            pos_embed_grid=tuple(module.pos_embed_grid),
            **preprocessing,
        )


def resolve_interpolation(name: str, num_register_tokens: int) -> str:
    """The rule of a library ("reference", "huggingface", "timm"); a rule's own name stays.

    Raises:
      ValueError: neither.
    """
    if name in INTERPOLATION_OF:
        return INTERPOLATION_OF[name][num_register_tokens > 0]
    if name not in INTERPOLATIONS:
        choices = (*INTERPOLATION_OF, *INTERPOLATIONS)
        raise ValueError(f"interpolation={name!r} must be one of {choices}; choose one of them")
    return name


def infer_spec(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    known: Mapping[str, Any] | None = None,
    num_heads: int | None = None,
    interpolation: str | None = None,
) -> ModelSpec | None:
    """What the shapes of a backbone tell.

    Args:
      shapes: reference's name -> shape, blocks not chunked.
      known: what the file says of itself: attributes of `ModelSpec`, any of them. Sizes that
        contradict the shapes are not believed: the shapes are what will be loaded.
      num_heads: attention heads; None: known, or width / 64.
      interpolation: a rule or a library; None: known, or the reference's.

    Returns:
      The spec; None if a parameter that it needs is missing or has another number of axes.

    Raises:
      ValueError: heads do not divide the width, or a position table that is not square and
        of which nothing is known.
    """
    known = dict(known or {})
    last = max(
        (int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", n) for n in shapes) if m), default=-1
    )
    is_swiglu = any(".mlp.w3." in name for name in shapes)
    inner = next(
        (s for n, s in shapes.items() if n.endswith(("mlp.w3.weight", "mlp.fc2.weight"))), ()
    )
    kernel, table = shapes.get("patch_embed.proj.weight", ()), shapes.get("pos_embed", ())
    if len(kernel) != 4 or len(table) != 3 or len(inner) != 2 or last < 0:
        return None
    registers = shapes.get("register_tokens", (1, 0, 0))
    if len(registers) != 3:
        return None
    d, c, p, _ = kernel
    is_rgb = c == 3
    grid = tuple(known.get("pos_embed_grid", ()))
    if math.prod(grid) != table[1] - 1 or len(grid) != 2:
        side = math.isqrt(table[1] - 1)
        if side * side != table[1] - 1:
            raise ValueError(
                f"pos_embed has {table[1] - 1} positions, which is no square, and the file does "
                "not say how many rows they have; only files written by dinov2_jax do"
            )
        grid = (side, side)
    heads = known.get("num_heads") or max(d // 64, 1) if num_heads is None else num_heads
    if heads < 1 or d % heads:
        raise ValueError(f"num_heads={heads} must divide the width {d}; give --num-heads")
    rule = interpolation or known.get("interpolation") or "reference"
    return ModelSpec(
        patch_size=p,
        embed_dim=d,
        depth=last + 1,
        num_heads=heads,
        ffn="swiglu" if is_swiglu else "mlp",
        hidden_dim=inner[1],
        num_register_tokens=registers[1],
        pos_embed_grid=grid,
        interpolation=resolve_interpolation(rule, registers[1]),
        in_channels=c,
        mean=tuple(known.get("mean") or (IMAGENET_MEAN if is_rgb else (0.0,) * c)),
        std=tuple(known.get("std") or (IMAGENET_STD if is_rgb else (1.0,) * c)),
        resize_size_px=known.get("resize_size_px", 256),
        crop_size_px=known.get("crop_size_px", 224),
    )
