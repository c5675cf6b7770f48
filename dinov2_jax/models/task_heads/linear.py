"""The linear classifier on frozen features: class tokens of some layers, mean patch of the last.

Behaviour follows dinov2/hub/classifiers.py and dinov2/eval/linear.py (Apache-2.0).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dinov2_jax.models.vit import BackboneOutput


class LinearHead(nn.Module):
    """Logits of `[cls of each layer.., mean patch of the last]`.

    The released heads are on the last layer, or on the last four, after the final normalisation.
    """

    num_classes: int

    @nn.compact
    def __call__(self, outputs: Sequence[BackboneOutput]) -> jax.Array:
        """Maps the outputs of n layers, first to last, to logits `[b, num_classes]`."""
        features = classifier_features(outputs)
        shape = (features.shape[-1], self.num_classes)
        kernel = self.param("kernel", nn.initializers.normal(0.01), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,))
        return features @ kernel + bias


def classifier_features(outputs: Sequence[BackboneOutput]) -> jax.Array:
    """`[b, (n + 1) * d]`: the class tokens of n layers, then the mean patch of the last."""
    mean_patch = outputs[-1].patches.mean(axis=1)
    return jnp.concatenate([*(output.cls for output in outputs), mean_patch], axis=-1)
