"""Models for dense evaluation: pixels, and a tiny network of random weights."""

import jax
import numpy as np

from dinov2_jax.evals.networks import load_network
from dinov2_jax.model import Model
from tests.convert.models import make_params, make_spec


def pixels(patch_size: int = 14) -> Model:
    """Pixels as features: no network at all, but all that a `Model` does."""
    return load_network(f"pixels:{patch_size}")


def tiny(depth: int = 4) -> Model:
    """Width 16, patches of 4 px, images padded to whole patches."""
    spec = make_spec(depth=depth)
    # A tenth, so that tokens stay about as large as those of a trained network.
    params = jax.tree.map(lambda x: 0.1 * x, make_params(spec))
    return Model(spec, params, uneven="pad")


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 `[height, width, 3]`."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
