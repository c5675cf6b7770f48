"""Stochastic depth: in training, a residual branch is left out for some of the images.

Images lie group-major: `[(num_groups rows), n, d]`. Every draw is made inside a group, so that
results depend on the groups, never on the devices, and every gather stays on its device.
Behaviour follows dinov2/layers/block.py (Apache-2.0), whose group is what one GPU holds.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange

from dinov2_jax.models.drop_path_pallas import join

MODES = ("subset", "bernoulli")
FORMS = ("gather", "matmul", "pallas")


@dataclasses.dataclass(frozen=True)
class DropPath:
    """What is dropped: hashable, hence a static argument of a block.

    Attributes:
      rate: share of images that skip a branch, in (0, 1).
      mode: "subset" computes the branch for exactly `num_kept` images of each group, drawn without
        replacement, and skips the work for the others; "bernoulli" computes it for all and keeps
        each with probability 1 - rate.
      num_groups: groups that the rows of every array fall into.
      form: how "subset" takes the kept images out and puts them back: "gather", "matmul" (by
        products with one-hot rows, faster on TPU) or "pallas" (by kernels for TPU, which normalise
        and add as well). The values are the same, but for roundings of the last.
    """

    rate: float
    mode: str = "subset"
    num_groups: int = 1
    form: str = "gather"

    def __post_init__(self):
        if not 0 <= self.rate < 1:
            raise ValueError(f"drop_path_rate={self.rate} must be in [0, 1); 0 turns it off")
        if self.mode not in MODES:
            raise ValueError(f"drop_path_mode={self.mode!r} must be one of {MODES}; choose one")
        if self.form not in FORMS:
            raise ValueError(f"drop_path_form={self.form!r} must be one of {FORMS}; choose one")


def choose_form(form: str, platform: str, layer_norm: str) -> str:
    """The form that "auto" means on devices of a platform such as "tpu"; others are checked.

    Raises:
      ValueError: the kernels on another platform, or without the kernel of layer normalisation.
    """
    if form == "auto":
        return {"pallas": "pallas", "xla": "matmul"}[layer_norm] if platform == "tpu" else "gather"
    if form == "pallas" and (platform != "tpu" or layer_norm != "pallas"):
        raise ValueError(
            f"drop_path_form='pallas' needs a TPU and layer_norm='pallas', not {platform} and "
            f"{layer_norm!r}; use 'auto'"
        )
    return form


def num_kept(rows: int, rate: float) -> int:
    """Images of a group of `rows` whose branch is computed: the reference's law."""
    return max(int(rows * (1 - rate)), 1)


def _unchanged(x: jax.Array) -> jax.Array:
    return x


def _as_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def add_residual(
    x: jax.Array,
    layer: Callable[..., jax.Array],
    *,
    norm: Callable[..., jax.Array] = _unchanged,
    scale: Callable[[jax.Array], jax.Array] = _as_float32,
    drop_path: DropPath | None,
    make_key: Callable[[], jax.Array],
) -> jax.Array:
    """`x + scale(layer(norm(x)))`, with stochastic depth.

    The residual of a kept image is scaled by rows / kept ("subset") or 1 / (1 - rate)
    ("bernoulli"): its expectation is that of the whole branch.

    Args:
      x: tokens `[(num_groups rows), n, d]`.
      layer: maps tokens `[any, n, d]` to residuals of the same shape, image by image. If the form
        is "pallas", with `hands_out_bias`, see `TokenDense`.
      norm: likewise; a `KernelLayerNorm` if the form is "pallas".
      scale: maps residuals `[any, n, d]` to float32 ones, by a factor for each of d. It
        comes after kept images are back in their places: in half precision half the bytes move.
      drop_path: None keeps everything.
      make_key: makes the key of the draw; called only if there is something to draw.

    Returns:
      `[(num_groups rows), n, d]` in the type of `x`; scaled and added in float32.

    Raises:
      ValueError: the rows do not fall into equal groups.
    """
    if drop_path is None or drop_path.rate == 0:
        return _add(x, scale(layer(norm(x))))
    num_groups = drop_path.num_groups
    if x.shape[0] % num_groups:
        raise ValueError(
            f"images={x.shape[0]} must be a multiple of {num_groups=}; pass whole groups"
        )
    rows = x.shape[0] // num_groups
    if drop_path.mode == "bernoulli":
        keep_rate = 1 - drop_path.rate
        keep = jax.random.bernoulli(make_key(), keep_rate, (num_groups, rows))
        factor = rearrange(keep / keep_rate, "s q -> (s q) 1 1")
        return _add(x, scale(layer(norm(x))) * factor)
    kept = num_kept(rows, drop_path.rate)
    if kept == rows:
        return _add(x, scale(layer(norm(x))))
    order = jnp.argsort(jax.random.uniform(make_key(), (num_groups, rows)), axis=1)
    if drop_path.form == "pallas":
        x, tokens = norm(x, order, kept)
        residual, bias = layer(tokens, hands_out_bias=True)
        gamma = scale(jnp.full((1, x.shape[-1]), rows / kept))
        return join(x, residual, bias, gamma, order)
    if drop_path.form == "matmul":
        picks = jax.nn.one_hot(order[:, :kept], rows)  # [s, kept, q]
        residual = layer(norm(_multiply("skq, sqnd -> sknd", picks, x)))
        return _add(x, scale(_multiply("skq, sknd -> sqnd", picks, residual)) * (rows / kept))
    chosen, rank = order[:, :kept], jnp.argsort(order, axis=1)  # rank inverts the order
    residual = layer(norm(take_rows(x, chosen, rank)))  # [(num_groups kept), n, d]
    return _add(x, scale(put_rows(residual, chosen, rank)) * (rows / kept))


def _add(x: jax.Array, residual: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) + residual).astype(x.dtype)


def _multiply(equation: str, picks: jax.Array, x: jax.Array) -> jax.Array:
    """Moves rows `[(s rows), n, d]` within their groups by a product with one-hot rows: exact."""
    x = rearrange(x, "(s rows) n d -> s rows n d", s=picks.shape[0])
    # TPU would round float32 factors to bfloat16; bfloat16 ones it multiplies exactly.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    x = jnp.einsum(equation, picks.astype(x.dtype), x, precision=precision)
    return rearrange(x, "s rows n d -> (s rows) n d")


# Taking rows out and putting them back are each other's transpose. Both are gathers: a scatter,
# which is what differentiating a gather would give, is slower on every backend.
@jax.custom_vjp
def take_rows(x: jax.Array, chosen: jax.Array, rank: jax.Array) -> jax.Array:
    """Takes the chosen rows of each group.

    Args:
      x: `[(s q), ...]`, groups of q rows.
      chosen: int `[s, kept]`, different rows of each group.
      rank: int `[s, q]`, place of each row in `chosen`; rows that are not there have a rank of
        `kept` or more.

    Returns:
      `[(s kept), ...]`.
    """
    x = rearrange(x, "(s q) n d -> s q n d", s=chosen.shape[0])
    x = jax.vmap(lambda group, index: group.at[index].get(mode="promise_in_bounds"))(x, chosen)
    return rearrange(x, "s q n d -> (s q) n d")


@jax.custom_vjp
def put_rows(y: jax.Array, chosen: jax.Array, rank: jax.Array) -> jax.Array:
    """Puts rows `[(s kept), ...]` back in their places: `[(s q), ...]`, 0 elsewhere."""
    y = rearrange(y, "(s q) n d -> s q n d", s=chosen.shape[0])
    y = jax.vmap(lambda group, index: group.at[index].get(mode="fill", fill_value=0))(y, rank)
    return rearrange(y, "s q n d -> (s q) n d")


take_rows.defvjp(
    lambda x, chosen, rank: (take_rows(x, chosen, rank), (chosen, rank)),
    lambda places, grad: (put_rows(grad, *places), None, None),
)
put_rows.defvjp(
    lambda y, chosen, rank: (put_rows(y, chosen, rank), (chosen, rank)),
    lambda places, grad: (take_rows(grad, *places), None, None),
)
