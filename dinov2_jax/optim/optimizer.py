"""AdamW as the reference runs it: clip each module, one Adam state, decay, learning rates.

Schedules stay outside: `update` takes the step's `Hyperparameters`. Behaviour follows
dinov2/train/train.py lines 114-121 and 248-261 (Apache-2.0) with torch's `AdamW` and
`clip_grad_norm_`; parameter groups are static multiplier trees instead of torch's groups.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from dinov2_jax.optim.schedules import Hyperparameters


def make_optimizer(
    *,
    b1: float,
    b2: float,
    eps: float,
    clip_norm: float,
    lr_multipliers: Any,
    wd_multipliers: Any,
    is_last_layer: Any,
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer. For each parameter, with m and v Adam's bias-corrected moments:

        grad *= min(1, clip_norm / (norm of the parameter's module + 1e-6))
        lr = (last_layer_learning_rate if is_last_layer else learning_rate) * lr_multiplier
        param -= lr * (m / (sqrt(v) + eps) + weight_decay * wd_multiplier * param)

    A frozen parameter (lr 0) neither moves nor decays; its moments do accumulate, as in torch.

    Args:
      b1, b2, eps: Adam's; 0.9, 0.999 and 1e-8 in the reference.
      clip_norm: largest L2 norm of the gradient of each module, i.e. of each top-level entry of
        the params (backbone, dino_head, ibot_head); 0: no clipping.
      lr_multipliers, wd_multipliers, is_last_layer: trees of `parameter_groups`.

    Returns:
      An optax transformation. `update` wants `params` and the keyword `hyperparameters`; its
      state is `optax.ScaleByAdamState`.
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def update(grads, opt_state, params, *, hyperparameters: Hyperparameters):
        directions, opt_state = adam.update(clip_by_module(grads, clip_norm), opt_state)

        def update_leaf(direction, param, lr_multiplier, wd_multiplier, is_last):
            learning_rate = (
                hyperparameters.last_layer_learning_rate
                if is_last
                else hyperparameters.learning_rate
            )
            decay = hyperparameters.weight_decay * wd_multiplier * param
            return -learning_rate * lr_multiplier * (direction + decay)

        updates = jax.tree.map(
            update_leaf, directions, params, lr_multipliers, wd_multipliers, is_last_layer
        )
        return updates, opt_state

    return optax.GradientTransformationExtraArgs(adam.init, update)


def module_norms(grads: dict[str, Any]) -> dict[str, Array]:
    """L2 norm of the gradient of each module (top-level entry), before clipping; f32 scalars."""
    return {name: optax.tree.norm(module) for name, module in grads.items()}


def clip_by_module(grads: dict[str, Any], clip_norm: float) -> dict[str, Any]:
    """Scales each module's gradient down to an L2 norm of `clip_norm`; 0 leaves all as they are.

    torch's law: the factor is clip_norm / (norm + 1e-6), at most 1.
    """
    if clip_norm == 0:
        return grads
    factors = {
        name: jnp.minimum(clip_norm / (norm + 1e-6), 1.0)
        for name, norm in module_norms(grads).items()
    }
    return {
        name: jax.tree.map(lambda grad, factor=factors[name]: grad * factor, module)
        for name, module in grads.items()
    }
