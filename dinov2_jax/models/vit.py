"""The vision transformer: images in, CLS, register and patch tokens out.

Blocks are one `nn.scan` over parameters stacked on a leading layer axis. Submodules carry the
reference's names, so that conversion is a table. Behaviour follows
dinov2/models/vision_transformer.py (Apache-2.0).
"""

from collections.abc import Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from dinov2_jax.models.attention import attention_probs, split_heads
from dinov2_jax.models.block import remat_block
from dinov2_jax.models.drop_path import DropPath
from dinov2_jax.models.layer_norm import LayerNorm
from dinov2_jax.models.layers import PatchEmbed, TokenDense
from dinov2_jax.models.pos_embed import interpolate_pos_embed

# The released sizes (dinov2/models/vision_transformer.py, dinov2/hub/backbones.py). Table 17 of
# the paper gives ViT-B 18 blocks; code and weights have 12.
VARIANTS = {
    "vit_small": dict(embed_dim=384, depth=12, num_heads=6, ffn="mlp"),
    "vit_base": dict(embed_dim=768, depth=12, num_heads=12, ffn="mlp"),
    "vit_large": dict(embed_dim=1024, depth=24, num_heads=16, ffn="mlp"),
    "vit_giant2": dict(embed_dim=1536, depth=40, num_heads=24, ffn="swiglu"),
}


@flax.struct.dataclass
class BackboneOutput:
    """Tokens after the final normalisation, in the compute type."""

    cls: jax.Array  # [b, d]
    registers: jax.Array  # [b, r, d]
    patches: jax.Array  # [b, n, d], row by row


class VisionTransformer(nn.Module):
    """DINOv2's backbone. `VARIANTS` has the released sizes.

    Attributes:
      patch_size: side of a patch in pixels.
      embed_dim: width `d`.
      depth: blocks.
      num_heads: attention heads; must divide the width.
      ffn: "mlp" or "swiglu".
      mlp_ratio: hidden width over embedding width, before SwiGLU's two thirds.
      layer_scale_init: initial residual scale, above 0.
      num_register_tokens: `r`; they follow CLS and have no position.
      pos_embed_grid: rows and columns of the stored position table, in patches.
      interpolation: "offset", "plain" or "antialias", see `interpolate_pos_embed`.
      in_channels: channels `c` of the images.
      drop_path_rate: stochastic depth in training, the same in every block.
      drop_path_mode: "subset" or "bernoulli", see `DropPath`; likewise drop_path_form.
      dtype: compute type; parameters, softmax and statistics are float32.
      remat: what the backward pass recomputes: "none", "dots" (all but the matrix products),
        "branches" (all but what is as wide as the tokens) or "blocks" (everything).
      keep_kernels: whether kernels that `fsdp` cuts are kept whole for it.
      attention: "xla", "by_head", "pallas" or "cudnn", see `Attention`.
      layer_norm: "xla", "products" or "pallas", of the blocks, see `make_layer_norm`.
      product_form: of the blocks' products with weights, see `choose_product_form`.
      scan_unroll: blocks in each turn of the scan.
    """

    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    ffn: str = "mlp"
    mlp_ratio: float = 4.0
    layer_scale_init: float = 1e-5
    num_register_tokens: int = 0
    pos_embed_grid: tuple[int, int] = (16, 16)
    interpolation: str = "offset"
    in_channels: int = 3
    drop_path_rate: float = 0.0
    drop_path_mode: str = "subset"
    drop_path_form: str = "gather"
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    keep_kernels: bool = False
    attention: str = "xla"
    layer_norm: str = "xla"
    product_form: str = "auto"
    scan_unroll: int = 1

    def setup(self):
        if self.layer_scale_init <= 0:
            raise ValueError(
                f"layer_scale_init={self.layer_scale_init} must be above 0, or no block would do "
                "anything; 1 starts without scaling, 1e-5 is the reference's"
            )
        if self.drop_path_form == "pallas" and self.layer_norm != "pallas":
            raise ValueError(
                f"drop_path_form='pallas' needs layer_norm='pallas', not {self.layer_norm!r}: its "
                "kernels normalise; set both, or another form"
            )
        d, normal = self.embed_dim, nn.initializers.normal
        rows, cols = self.pos_embed_grid
        self.patch_embed = PatchEmbed(self.patch_size, d, dtype=self.dtype)
        self.cls_token = self.param("cls_token", normal(1e-6), (1, 1, d))
        self.pos_embed = self.param("pos_embed", normal(0.02), (1, 1 + rows * cols, d))
        self.mask_token = self.param("mask_token", nn.initializers.zeros, (1, d))
        if self.num_register_tokens:
            shape = (1, self.num_register_tokens, d)
            self.register_tokens = self.param("register_tokens", normal(1e-6), shape)
        self.blocks = nn.scan(
            remat_block(self.remat, keep_kernels=self.keep_kernels),
            variable_axes={"params": 0},
            split_rngs={"params": True, "drop_path": True},
            in_axes=(0, nn.broadcast),
            length=self.depth,
            unroll=self.scan_unroll,
        )(
            num_heads=self.num_heads,
            ffn=self.ffn,
            mlp_ratio=self.mlp_ratio,
            layer_scale_init=self.layer_scale_init,
            dtype=self.dtype,
            attention=self.attention,
            layer_norm=self.layer_norm,
            product_form=self.product_form,
        )
        self.norm = LayerNorm(dtype=self.dtype)

    def __call__(self, images, masks=None, *, train: bool = False, num_groups: int = 1):
        """Embeds images of one or several sizes.

        Args:
          images: `[b, height, width, c]`, normalised; or a tuple of such arrays, of different
            sizes, which go through each block together. Sides must be multiples of the patch.
          masks: bool `[b, n]`, True: the patch is replaced by the mask token; or None. For a
            tuple of images a tuple of those.
          train: whether stochastic depth is on; if so and its rate is above 0, the random stream
            "drop_path" is needed.
          num_groups: groups that stochastic depth draws in. The images of every array must lie
            group-major, `[(num_groups rows), ...]`.

        Returns:
          `BackboneOutput`, or a tuple of them, as `images`.

        Raises:
          ValueError: sides that are no multiples of the patch, or a wrong number of channels.
        """
        single = not isinstance(images, tuple)
        if single:
            images, masks = (images,), (masks,)
        elif masks is None:
            masks = (None,) * len(images)
        drop_path = None
        if train and self.drop_path_rate > 0:
            drop_path = DropPath(
                self.drop_path_rate, self.drop_path_mode, num_groups, self.drop_path_form
            )
        with jax.named_scope("backbone"):
            xs = tuple(self.embed(x, mask) for x, mask in zip(images, masks, strict=True))
            (xs, _), _ = self.blocks((xs, None), None, drop_path)
            outputs = tuple(self.split(self.norm(x)) for x in xs)
        return outputs[0] if single else outputs

    def intermediate_layers(
        self, images: jax.Array, layers: int | Sequence[int] = 1, *, norm: bool = True
    ) -> list[BackboneOutput]:
        """Outputs of several blocks, in the order of the blocks.

        Args:
          images: `[b, height, width, c]`, normalised.
          layers: how many of the last blocks, or which blocks, counted from 0.
          norm: whether the final normalisation is applied to each.

        Returns:
          One `BackboneOutput` per block.

        Raises:
          ValueError: blocks that do not exist, or the same twice.
        """
        if isinstance(layers, int):
            layers = range(self.depth - layers, self.depth)
        chosen = sorted(layers)
        if not chosen or sorted(set(chosen) & set(range(self.depth))) != chosen:
            raise ValueError(
                f"layers={list(layers)} must be different blocks of 0..{self.depth - 1}; choose "
                "among them, or give how many of the last ones"
            )
        with jax.named_scope("backbone"):
            collected = self._after_blocks(self.embed(images, None), chosen)
            return [self.split(self.norm(x) if norm else x) for x in collected]

    def cls_attention(self, images: jax.Array, block: int) -> jax.Array:
        """How much CLS attends to each token in one block.

        Args:
          images: `[b, height, width, c]`, normalised.
          block: counted from 0.

        Returns:
          Probabilities, float32 `[b, heads, 1 + r + n]`, in the order of the tokens.

        Raises:
          ValueError: a block that does not exist.
        """
        if not 0 <= block < self.depth:
            raise ValueError(f"{block=} must be one of 0..{self.depth - 1}; choose one of them")
        with jax.named_scope("backbone"):
            x = self.embed(images, None)
            if block > 0:
                (x,) = self._after_blocks(x, [block - 1])
            # The scan hides its blocks' modules, and keeping every block's n x n matrix would cost
            # memory: the one block's parameters go to the same layers once more.
            params = jax.tree.map(lambda a: a[block], self.blocks.variables["params"])
            norm1 = LayerNorm(dtype=self.dtype, parent=None)
            qkv = TokenDense(3 * self.embed_dim, dtype=self.dtype, parent=None)
            x = norm1.apply({"params": params["norm1"]}, x)
            x = qkv.apply({"params": params["attn"]["qkv"]}, x)
            q, k, _ = split_heads(x, self.num_heads)
            return attention_probs(q[:, :, :1], k)[:, :, 0]

    def _after_blocks(self, x: jax.Array, chosen: Sequence[int]) -> jax.Array:
        """Tokens after each of the chosen blocks, ascending: `[len(chosen), b, 1 + r + n, d]`."""
        # Only the chosen outputs are kept; all others share one more slot.
        buffer = jnp.zeros((len(chosen) + 1, *x.shape), x.dtype)
        slots = [chosen.index(i) if i in chosen else len(chosen) for i in range(self.depth)]
        carry, _ = self.blocks(((x,), (buffer,)), jnp.array(slots), None)
        return carry[1][0][: len(chosen)]

    def embed(self, images: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Tokens of images `[b, height, width, c]` before the blocks: `[b, 1 + r + n, d]`."""
        b, height, width, c = images.shape
        if c != self.in_channels:
            raise ValueError(
                f"images have {c} channels but in_channels={self.in_channels}; "
                "channels are the last axis"
            )
        x = self.patch_embed(images)  # [b, n, d]
        dtype = x.dtype
        if mask is not None:
            if mask.shape != x.shape[:2]:
                raise ValueError(f"{mask.shape=} must be [b, n] = {x.shape[:2]}, one per patch")
            x = jnp.where(mask[..., None], self.mask_token, x)
        pos_embed = interpolate_pos_embed(
            self.pos_embed,
            stored_grid=self.pos_embed_grid,
            grid=(height // self.patch_size, width // self.patch_size),
            interpolation=self.interpolation,
        )
        prefix = self.cls_token + pos_embed[:, :1]
        if self.num_register_tokens:
            prefix = jnp.concatenate([prefix, self.register_tokens], axis=1)
        prefix = jnp.broadcast_to(prefix.astype(dtype), (b, *prefix.shape[1:]))
        return jnp.concatenate([prefix, (x + pos_embed[:, 1:]).astype(dtype)], axis=1)

    def split(self, x: jax.Array) -> BackboneOutput:
        """Names the tokens of `[b, 1 + r + n, d]`."""
        r = self.num_register_tokens
        return BackboneOutput(cls=x[:, 0], registers=x[:, 1 : 1 + r], patches=x[:, 1 + r :])
