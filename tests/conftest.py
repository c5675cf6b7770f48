"""Eight host devices for every test, and fixtures that several files share."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Level 0: most of a test's time is compilation, and this halves it; numbers keep their precision.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
).strip()

import jax
import pytest


@pytest.fixture
def key() -> jax.Array:
    """A jax PRNG key."""
    return jax.random.key(0)
