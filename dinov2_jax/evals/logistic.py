"""Logistic regression for a grid of C, several values at once, on the device, in float64.

    C * sum of cross-entropies + |weights|^2 / 2        (the biases are free)

In: features `[n, d]` and targets: class numbers `[n]` (softmax; of two classes one sigmoid, as in
scikit-learn and cuML), or `[n, c]` of 1, 0 and -1 (a sigmoid for each class; -1 does not count).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dinov2_jax.evals.lbfgs import begin, minimize
from dinov2_jax.progress import format_secs

# The protocol's 45 values (SimCLR's; dinov2/eval/log_regression.py).
C_GRID = tuple(float(x) for x in 10.0 ** np.linspace(-6, 5, 45))
MAX_ITERATIONS = 1000
# Of the gradient of the mean loss, in the scale of `_solve`. At 1e-5 a few predictions may differ
# from those of the optimum, at 1e-6 none did, whatever C.
TOLERANCE = 1e-6
_BYTES_AT_ONCE = 2 * 2**30
# Small values of C need a tenth of the iterations of large ones: they must not wait for them.
_MAX_AT_ONCE = 9
_MEMORY = 10
_ITERATIONS_AT_ONCE = 25  # between two words of how far it is


class Classifier(NamedTuple):
    """Weights of one C."""

    kernel: np.ndarray  # float64 [d, c]; of two classes [d, 1]
    bias: np.ndarray  # float64 [c]

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Logits `[rows, classes]`, float64; of two classes the first is 0."""
        logits = np.asarray(features, np.float64) @ self.kernel + self.bias
        is_binary = logits.shape[1] == 1
        return np.concatenate([np.zeros_like(logits), logits], axis=1) if is_binary else logits


class Fitted(NamedTuple):
    """What became of one C."""

    c: float
    classifier: Classifier
    iterations: int
    gradient: float  # largest entry at the end; above the tolerance: not converged


def fit_grid(
    features: np.ndarray,
    targets: np.ndarray,
    grid: Sequence[float] = C_GRID,
    *,
    num_classes: int,
    dtype: str = "float64",
    max_iterations: int = MAX_ITERATIONS,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Fitted]:
    """Fits every C, several at once: nine, if 2 GiB hold them.

    The features are centred and turned into their principal axes, which changes no optimum (the
    biases are free, the penalty is round), and the axes are scaled to a curvature of about one,
    which saves L-BFGS most of its iterations.

    Args:
      features: `[n, d]`, as they are.
      targets: see the module.
      grid: values of C.
      num_classes: c.
      dtype: "float64", or "float32" where the device has no other.
      max_iterations: of L-BFGS.
      on_progress: called now and then, with how far the solver is and what may be left, in words.

    Yields:
      In the order of the grid.

    Raises:
      ValueError: features that are not finite; or fewer than two classes.
    """
    features = np.asarray(features, np.float64)
    if not np.isfinite(features).all():
        row = int(np.argmin(np.isfinite(features).all(axis=1)))
        raise ValueError(f"features must be finite, and row {row} is not; look at that image")
    if num_classes < 2:
        raise ValueError(f"{num_classes=} must be at least 2")
    hot, counts = _targets(targets, num_classes)
    is_softmax = targets.ndim == 1 and num_classes > 2
    center = features.mean(axis=0)
    features = features - center
    axes, variances = _principal_axes(features)
    size = _num_at_once(len(features), len(variances), hot.shape[1], len(grid))
    with jax.enable_x64(dtype == "float64"):
        turned = jnp.asarray(features @ axes, dtype)
        del features
        hot, counts = jnp.asarray(hot, dtype), jnp.asarray(counts, dtype)
        for start in range(0, len(grid), size):
            part = list(grid[start : start + size])
            padded = np.array(part + part[-1:] * (size - len(part)))  # one shape, one compilation
            solve = partial(
                _solve,
                turned,
                hot,
                counts,
                jnp.asarray(padded, dtype),
                jnp.asarray(variances, dtype),
                is_softmax=is_softmax,
                tolerance=TOLERANCE,
            )
            num_weights = (len(variances) + 1) * hot.shape[1]
            state = begin(jnp.zeros((size, num_weights), dtype), memory=_MEMORY)
            later = len(range(start + size, len(grid), size))
            for done in range(0, max_iterations, _ITERATIONS_AT_ONCE):
                began, more = time.monotonic(), min(_ITERATIONS_AT_ONCE, max_iterations - done)
                state, *found = solve(state, more)
                if state.is_done.all():
                    break
                left = max_iterations * (1 + later) - done - more
                secs = (time.monotonic() - began) / more * left
                on_progress(
                    f"C {part[0]:.3g} to {part[-1]:.3g}: iteration {done + more} of at most "
                    f"{max_iterations}; with all others at most {format_secs(secs)}"
                )
            kernels, biases = jax.device_get(found)
            iterations, gradients = jax.device_get((state.iterations, state.gradient))
            for i, c in enumerate(part):
                kernel = axes @ kernels[i].astype(np.float64)
                bias = biases[i].astype(np.float64) - center @ kernel
                yield Fitted(c, Classifier(kernel, bias), int(iterations[i]), float(gradients[i]))


@partial(jax.jit, static_argnames=("is_softmax", "tolerance"), donate_argnums=5)
def _solve(features, hot, counts, grid, variances, state, num_iterations, *, is_softmax, tolerance):
    """So many iterations more of the grid `[k]`: its state, and what that means: kernels
    `[k, d, c]` and biases `[k, c]`."""
    (n, d), c = features.shape, hot.shape[1]
    penalty = 1 / (grid * n)
    # Of the loss along an axis of variance one, about: the surer the classes, the flatter it is.
    # It decides the speed alone; this law was the fastest for features of trained and random ViTs.
    curvature = 0.02 / jnp.sqrt(1 + 100 * grid)
    scale = 1 / jnp.sqrt(curvature[:, None] * variances + penalty[:, None])  # [k, d]
    bias_scale = 1 / jnp.sqrt(curvature)[:, None]

    def unpack(x):
        x = x.reshape(-1, d + 1, c)
        return x[:, :d] * scale[:, :, None], x[:, d] * bias_scale

    def loss(x):
        kernel, bias = unpack(x)
        logits = jnp.einsum("nd,kdc->knc", features, kernel, precision="highest") + bias[:, None]
        if is_softmax:
            entropies = jax.nn.logsumexp(logits, axis=-1) - (logits * hot).sum(axis=-1)
        else:
            entropies = (counts * (jax.nn.softplus(logits) - logits * hot)).sum(axis=-1)
        values = entropies.mean(axis=-1) + penalty / 2 * (kernel**2).sum(axis=(1, 2))
        return values.sum(), values

    def value_and_gradient(x):
        (_, values), gradients = jax.value_and_grad(loss, has_aux=True)(x)
        return values, gradients

    state = minimize(value_and_gradient, state, max_iterations=num_iterations, tolerance=tolerance)
    return state, *unpack(state.x)


def _principal_axes(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Axes `[d, r]` that span the centred features, and the variance along each."""
    n, d = features.shape
    if n < d:
        # The optimum lies in the span of the images: no other direction needs to be looked at.
        _, lengths, axes = np.linalg.svd(features, full_matrices=False)
        return axes.T, lengths**2 / n
    variances, axes = np.linalg.eigh(features.T @ features / n)
    return axes, np.maximum(variances, 0)


def _targets(targets: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Ones where a class is right, and where it counts at all: `[n, c]` each."""
    if targets.ndim == 2:
        return targets == 1, targets >= 0
    hot = np.asarray(targets)[:, None] == np.arange(num_classes)
    if num_classes == 2:
        hot = hot[:, 1:]
    return hot, np.ones_like(hot)


def _num_at_once(n: int, d: int, c: int, total: int) -> int:
    """How many values of C to fit at once: pairs and points of L-BFGS, and a few sets of logits."""
    of_one = 8 * ((d + 1) * c * (2 * _MEMORY + 8) + 4 * n * c)
    fit = int(np.clip(_BYTES_AT_ONCE // of_one, 1, min(total, _MAX_AT_ONCE)))
    return -(-total // -(-total // fit))  # groups of nearly one size
