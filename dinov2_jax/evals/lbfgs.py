"""L-BFGS on many smooth convex problems of one shape at once, each with steps of its own."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

_SUFFICIENT = 1e-4  # share of the decrease that the slope promises
_MAX_HALVINGS = 20

# [problems, p] -> [problems], [problems, p]
ValueAndGradient = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


class _Point(NamedTuple):
    x: jax.Array
    value: jax.Array
    gradient: jax.Array


class _History(NamedTuple):
    """The last pairs, oldest first, and the scale of the first guess of the inverse Hessian."""

    steps: jax.Array  # [memory, problems, p]
    changes: jax.Array  # of the gradient, likewise
    weights: jax.Array  # [memory, problems]: 1 / (step . change), 0 for no pair
    scale: jax.Array  # [problems]; 0 before the first pair


class State(NamedTuple):
    """Where the problems stand, and all that going on needs."""

    point: _Point
    history: _History
    gradient: jax.Array  # [problems]: its largest entry
    is_done: jax.Array  # bool [problems]
    iterations: jax.Array  # int32 [problems]

    @property
    def x(self) -> jax.Array:
        """`[problems, p]`."""
        return self.point.x


def begin(x: jax.Array, *, memory: int = 10) -> State:
    """The state before the first iteration, which makes no step: it looks at the start alone.

    Args:
      x: `[problems, p]`.
      memory: pairs kept.
    """
    num_problems, num_params = x.shape
    pairs = (memory, num_problems, num_params)
    dtype = x.dtype
    return State(
        _Point(x, jnp.full(num_problems, jnp.inf, dtype), jnp.zeros_like(x)),
        _History(
            jnp.zeros(pairs, dtype),
            jnp.zeros(pairs, dtype),
            jnp.zeros(pairs[:2], dtype),
            jnp.zeros(num_problems, dtype),
        ),
        jnp.full(num_problems, jnp.inf, dtype),
        jnp.zeros(num_problems, bool),
        jnp.zeros(num_problems, jnp.int32),
    )


def minimize(
    value_and_gradient: ValueAndGradient,
    state: State,
    *,
    max_iterations: int | jax.Array,
    tolerance: float,
) -> State:
    """Minimises every problem until no entry of its gradient exceeds the tolerance.

    One that cannot be lowered any more in the precision of its type ends too.

    Args:
      value_and_gradient: of convex functions.
      state: of `begin`, or where an earlier call has ended, from which this one goes on.
      max_iterations: of each problem, in this call.
      tolerance: see above.

    References: Nocedal and Wright, Numerical Optimization, algorithms 7.4 and 7.5.
    """

    def goes_on(state_and_count):
        state, count = state_and_count
        return (count < max_iterations) & ~state.is_done.all()

    def iterate(state_and_count):
        (point, history, _, is_done, iterations), count = state_and_count
        direction = _direction(point.gradient, history)
        new, found = _search(value_and_gradient, point, direction, is_done)
        gradient = _largest(new.gradient)
        is_done_now = is_done | ~found | (gradient <= tolerance)
        history = _remember(history, new.x - point.x, new.gradient - point.gradient)
        return State(new, history, gradient, is_done_now, iterations + ~is_done), count + 1

    return jax.lax.while_loop(goes_on, iterate, (state, 0))[0]


def _direction(gradient: jax.Array, history: _History) -> jax.Array:
    """The two-loop recursion: minus the approximate inverse Hessian times the gradient."""

    def from_newest(q, pair):
        step, change, weight = pair
        share = weight * _dot(step, q)
        return q - share[:, None] * change, share

    def from_oldest(r, pair):
        (step, change, weight), share = pair
        return r + (share - weight * _dot(change, r))[:, None] * step, None

    # Without a pair the first step is no longer than one.
    first = 1 / jnp.maximum(1, jnp.sqrt(_dot(gradient, gradient)))
    scale = jnp.where(history.scale > 0, history.scale, first)
    pairs = (history.steps, history.changes, history.weights)
    q, shares = jax.lax.scan(from_newest, gradient, pairs, reverse=True)
    r, _ = jax.lax.scan(from_oldest, scale[:, None] * q, (pairs, shares))
    # Rounding may spoil a direction at the very end: the gradient's own always descends.
    descends = _dot(r, gradient) > 0
    return -jnp.where(descends[:, None], r, gradient)


def _search(
    value_and_gradient: ValueAndGradient,
    point: _Point,
    direction: jax.Array,
    is_done: jax.Array,
) -> tuple[_Point, jax.Array]:
    """Halves each step until it lowers its value enough (Armijo).

    Where rounding hides the decrease the slopes must show it (Hager and Zhang, 2005, 4.1).

    Returns:
      The new points, where a step was found, and whether.
    """
    slope = _dot(direction, point.gradient)
    level = point.value + 4 * jnp.finfo(slope.dtype).eps * jnp.abs(point.value)

    def goes_on(state):
        _, _, found, tries = state
        return (tries < _MAX_HALVINGS) & ~found.all()

    def halve(state):
        length, best, found, tries = state
        x = point.x + length[:, None] * direction
        value, gradient = value_and_gradient(x)
        is_lower = value <= point.value + _SUFFICIENT * length * slope
        is_flatter = _dot(gradient, direction) <= (2 * _SUFFICIENT - 1) * slope
        is_good = ~found & (is_lower | ((value <= level) & is_flatter))
        best = jax.tree.map(
            lambda new, old: jnp.where(is_good.reshape(-1, *[1] * (new.ndim - 1)), new, old),
            _Point(x, value, gradient),
            best,
        )
        found = found | is_good
        return jnp.where(found, length, length / 2), best, found, tries + 1

    first = (jnp.ones_like(slope), point, is_done, 0)
    _, best, found, _ = jax.lax.while_loop(goes_on, halve, first)
    return best, found


def _remember(history: _History, step: jax.Array, change: jax.Array) -> _History:
    """Adds a pair, in place of the oldest; one without curvature does not count."""
    curvature, square = _dot(step, change), _dot(change, change)
    noise = jnp.finfo(step.dtype).eps * jnp.sqrt(_dot(step, step) * square)
    is_good = curvature > noise
    weight = jnp.where(is_good, 1 / jnp.where(is_good, curvature, 1), 0)
    scale = jnp.where(is_good, curvature / jnp.where(is_good, square, 1), history.scale)

    def push(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.concatenate([old[1:], new[None]])

    return _History(
        push(history.steps, step),
        push(history.changes, change),
        push(history.weights, weight),
        scale,
    )


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a * b).sum(axis=-1)


def _largest(gradient: jax.Array) -> jax.Array:
    return jnp.abs(gradient).max(axis=-1)
