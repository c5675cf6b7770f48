"""The grid of the linear probe: all its classifiers at once, as one program.

In: features `[b, width]` of frozen images: the class tokens of the last layers, oldest first, then
the mean patch of the last. Every classifier sees a stretch of these columns, so that
those of one stretch and all learning rates are one matrix product.
Behaviour follows dinov2/eval/linear.py (Apache-2.0): SGD with momentum 0.9 and no weight decay,
cosine to 0, the sum of all cross-entropies, weights from N(0, 0.01).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The paper's (B.3) as they are; the code's are multiplied by batch size / 256.
LEARNING_RATES = {
    "paper": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.3, 0.5),
    "code": (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
}
MOMENTUM = 0.9
_INIT_DEVIATION = 0.01
_REFERENCE_BATCH = 256


class Variant(NamedTuple):
    """What a classifier sees."""

    num_layers: int  # whose class tokens, counted from the last
    has_mean: bool  # whether the last layer's mean patch too

    @property
    def name(self) -> str:
        """Such as "cls4" or "cls1_mean"."""
        return f"cls{self.num_layers}" + ("_mean" if self.has_mean else "")


class Columns(NamedTuple):
    """How features are laid out."""

    num_layers: int
    cls_dim: int  # of each layer
    mean_dim: int

    @property
    def width(self) -> int:
        """Of all."""
        return self.num_layers * self.cls_dim + self.mean_dim

    def of(self, variant: Variant) -> slice:
        """Those that a variant sees."""
        end = self.num_layers * self.cls_dim
        start = end - variant.num_layers * self.cls_dim
        return slice(start, end + variant.has_mean * self.mean_dim)


class ProbeState(NamedTuple):
    """Classifiers under training: trees `{variant: {"kernel": [d, l, c], "bias": [l, c]}}`."""

    params: Any
    velocity: Any
    step: jax.Array  # int32


def learning_rates(grid: str | Sequence[float], *, batch_size: int) -> tuple[float, ...]:
    """The rates of "paper", "code" (times batch size / 256), or those given, as they are."""
    if grid == "code":
        return tuple(rate * batch_size / _REFERENCE_BATCH for rate in LEARNING_RATES["code"])
    return LEARNING_RATES["paper"] if grid == "paper" else tuple(grid)


def init_probe(
    key: jax.Array,
    variants: Sequence[Variant],
    *,
    columns: Columns,
    num_rates: int,
    num_classes: int,
) -> ProbeState:
    """Classifiers before the first step; each variant and rate has weights of its own."""
    params = {}
    for i, variant in enumerate(variants):
        seen = columns.of(variant)
        shape = (seen.stop - seen.start, num_rates, num_classes)
        kernel = _INIT_DEVIATION * jax.random.normal(jax.random.fold_in(key, i), shape)
        params[variant.name] = {"kernel": kernel, "bias": jnp.zeros(shape[1:])}
    return ProbeState(params, jax.tree.map(jnp.zeros_like, params), jnp.int32(0))


def probe_logits(
    params: Any, variants: Sequence[Variant], features: jax.Array, *, columns: Columns
) -> dict[str, jax.Array]:
    """Logits `[b, l, c]` of every learning rate, by variant, in full float32."""
    return {
        v.name: jnp.einsum(
            "bd,dlc->blc",
            features[:, columns.of(v)],
            params[v.name]["kernel"],
            precision=jax.lax.Precision.HIGHEST,
        )
        + params[v.name]["bias"]
        for v in variants
    }


@partial(jax.jit, static_argnames=("variants", "columns", "total_steps"), donate_argnums=0)
def train_steps(
    state: ProbeState,
    features: jax.Array,
    labels: jax.Array,
    rates: jax.Array,
    *,
    variants: tuple[Variant, ...],
    columns: Columns,
    total_steps: int,
) -> tuple[ProbeState, jax.Array]:
    """Several steps of all classifiers.

        velocity = 0.9 velocity + gradient
        weights -= rate * (1 + cos(pi step / total_steps)) / 2 * velocity

    Args:
      state: before; its memory is reused.
      features: float32 `[steps, b, width]`.
      labels: int32 `[steps, b]`.
      rates: float32 `[l]`.
      variants: of the state.
      columns: of the features.
      total_steps: of the whole schedule.

    Returns:
      The state after, and the losses `[steps, variants, l]` before each step.
    """

    def objective(params, x, y):
        logits = probe_logits(params, variants, x, columns=columns)
        log_probs = (jax.nn.log_softmax(logits[v.name]) for v in variants)
        losses = jnp.stack([-_take(p, y).mean(axis=0) for p in log_probs])
        return losses.sum(), losses

    def step(state: ProbeState, batch):
        gradients, losses = jax.grad(objective, has_aux=True)(state.params, *batch)
        decay = (1 + jnp.cos(jnp.pi * state.step / total_steps)) / 2
        velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, state.velocity, gradients)
        # The rates are the last axis but one of kernels and biases alike.
        move = (rates * decay)[:, None]
        params = jax.tree.map(lambda p, v: p - move * v, state.params, velocity)
        return ProbeState(params, velocity, state.step + 1), losses

    return jax.lax.scan(step, state, (features, labels))


@partial(jax.jit, static_argnames=("variants", "columns"))
def predict_grid(
    params: Any, features: jax.Array, *, variants: tuple[Variant, ...], columns: Columns
) -> jax.Array:
    """The class each classifier takes each image for: int32 `[variants, l, b]`."""
    logits = probe_logits(params, variants, features, columns=columns)
    return jnp.stack([logits[v.name].argmax(axis=-1).T for v in variants]).astype(jnp.int32)


def is_finite(params: Any, variants: Sequence[Variant]) -> np.ndarray:
    """Which classifiers have not diverged: bool `[variants, l]`."""
    return np.stack(
        [
            np.isfinite(np.asarray(params[v.name]["kernel"])).all(axis=(0, 2))
            & np.isfinite(np.asarray(params[v.name]["bias"])).all(axis=1)
            for v in variants
        ]
    )


def _take(log_probs: jax.Array, labels: jax.Array) -> jax.Array:
    """`[b, l]`: the label's entry of `[b, l, c]`."""
    return jnp.take_along_axis(log_probs, labels[:, None, None], axis=-1)[..., 0]
