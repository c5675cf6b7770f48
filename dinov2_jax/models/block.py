"""One layer of the transformer, made to be scanned over depth.

In and out: token arrays of several image sizes, so that each layer's parameters are fetched once.
Behaviour follows dinov2/layers/block.py (Apache-2.0).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dinov2_jax.models.attention import Attention
from dinov2_jax.models.drop_path import DropPath, add_residual
from dinov2_jax.models.layer_norm import make_layer_norm
from dinov2_jax.models.layers import LayerScale, Mlp, SwiGLU, ffn_hidden_dim
from dinov2_jax.models.spread import spread_kernels
from dinov2_jax.sharding import fsdp_cuts_parameters, row_shards, shard_rows

REMATS = ("none", "dots", "branches", "blocks")


class Block(nn.Module):
    """Attention and a feed-forward network, each a scaled residual of normalised tokens.

    Attributes:
      num_heads: attention heads.
      ffn: "mlp" or "swiglu".
      mlp_ratio: hidden width over embedding width, before SwiGLU's two thirds.
      layer_scale_init: initial `gamma`.
      dtype: compute type.
      attention: implementation, see `attend`.
      layer_norm: form, see `make_layer_norm`.
      product_form: of the products with weights, see `choose_product_form`.
    """

    num_heads: int
    ffn: str = "mlp"
    mlp_ratio: float = 4.0
    layer_scale_init: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    attention: str = "xla"
    layer_norm: str = "xla"
    product_form: str = "auto"

    @nn.compact
    def __call__(self, carry, slot: jax.Array | None, drop_path: DropPath | None):
        """One layer, as `nn.scan` wants it.

        Args:
          carry: `(xs, collected)`: a tuple of tokens `[b, n, d]`, one per image size, and one of
            buffers for them, `[slots, b, n, d]`, or None.
          slot: where in the buffers this layer's output goes; None without buffers.
          drop_path: stochastic depth, or None.

        Returns:
          The new carry, and None.
        """
        xs, collected = carry
        layers, shards = Block._layers, row_shards(*xs)
        # Drop path leaves as many rows of each group: groups must not lie across devices.
        are_whole = drop_path is None or drop_path.num_groups % shards == 0
        if len(xs) > 1 and shards > 1 and are_whole and not self.is_initializing():
            # Else each size's gradient of a kernel would be summed over the mesh by itself.
            kernels = functools.partial(spread_kernels, dtype=self.dtype)
            layers = nn.map_variables(layers, "params", trans_in_fn=kernels)
        xs = layers(self, xs, drop_path)
        if slot is not None:
            collected = tuple(
                jax.lax.dynamic_update_index_in_dim(buffer, x, slot, axis=0)
                for buffer, x in zip(collected, xs, strict=True)
            )
        return (xs, collected), None

    def _layers(self, xs: tuple[jax.Array, ...], drop_path: DropPath | None):
        norm1 = make_layer_norm(self.layer_norm, dtype=self.dtype, name="norm1")
        products = dict(dtype=self.dtype, product_form=self.product_form)
        attn = Attention(self.num_heads, self.attention, **products, name="attn")
        ls1 = LayerScale(self.layer_scale_init, name="ls1")
        norm2 = make_layer_norm(self.layer_norm, dtype=self.dtype, name="norm2")
        hidden_dim = ffn_hidden_dim(xs[0].shape[-1], self.mlp_ratio, self.ffn)
        mlp = {"mlp": Mlp, "swiglu": SwiGLU}[self.ffn](hidden_dim, **products, name="mlp")
        ls2 = LayerScale(self.layer_scale_init, name="ls2")

        def make_key():
            return self.make_rng("drop_path")

        # Each branch of each array draws its own images.
        for norm, layer, scale in ((norm1, attn, ls1), (norm2, mlp, ls2)):

            def named(tokens, layer=layer, hands_out_bias=False):
                if hands_out_bias:
                    residual, bias = layer(tokens, hands_out_bias=True)
                    return checkpoint_name(residual, "branch"), bias
                return checkpoint_name(layer(tokens), "branch")

            settings = dict(norm=norm, scale=scale, drop_path=drop_path, make_key=make_key)
            xs = tuple(shard_rows(add_residual(x, named, **settings)) for x in xs)
        return xs


def choose_remat(remat: str, platform: str) -> str:
    """What "auto" means on devices of a platform such as "cpu"; others stay.

    On CPU writing and reading what is kept costs more than computing all but the products again;
    on TPU, by its compiler's word, more than the products of the wide layers too.
    """
    if remat == "auto":
        return {"cpu": "dots", "tpu": "branches"}.get(platform, "none")
    return remat


def _all_but_copies(primitive, *_, **__) -> bool:
    """What costs nothing to make again: `spread` is made of these, and its result has a name."""
    return primitive.name not in ("broadcast_in_dim", "sharding_constraint", "reshape", "name")


def choose_backward_kernels(setting: str, device_kind: str) -> str:
    """What "auto" means on a device, "keep" or "gather"; others stay.

    By the TPU compiler's word writing and reading the kernels costs less than gathering them again
    on v6e and tpu7x, and more on v5e; v4 and v5p by the likeness of their links. On GPUs as the
    reference does (FSDP's SHARD_GRAD_OP).
    """
    if setting == "auto":
        return "gather" if device_kind in ("cpu", "TPU v5 lite", "TPU v5e") else "keep"
    return setting


def remat_block(remat: str, *, keep_kernels: bool = False) -> type[Block]:
    """`Block`, with the backward pass recomputing what `remat` says.

    Args:
      remat: one of `REMATS`.
      keep_kernels: whether kernels that `fsdp` cuts are kept whole for the backward pass, and not
        gathered again; of a block that is given crops of several sizes.
    """
    policies = jax.checkpoint_policies
    keep_kernels = keep_kernels and fsdp_cuts_parameters()
    if remat == "none" and (keep_kernels or row_shards() == 1):
        return Block
    if remat == "none":
        # All but whole kernels on each device, of all blocks.
        policy = _all_but_copies
    elif remat == "dots":
        # The products with weights and the attention's result; its n x n matrices are not kept.
        policy = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable,
            policies.save_only_these_names("attention", "product"),
        )
    elif remat == "branches":
        # What is as wide as the tokens; queries, keys, values and the hidden layer are wider.
        policy = policies.save_only_these_names("attention", "branch")
    elif remat == "blocks":
        policy = policies.nothing_saveable
    else:
        raise ValueError(f"{remat=} must be one of {REMATS}; choose one of them")
    if keep_kernels:
        policy = policies.save_from_both_policies(policy, policies.save_only_these_names("kernel"))
    # The scan keeps XLA from merging the recomputation with the forward pass.
    return nn.remat(Block, prevent_cse=False, static_argnums=(3,), policy=policy)
