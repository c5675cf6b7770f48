"""All devices of this host: batches are cut over them, parameters lie on each."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dinov2_jax.sharding import batch_sharding, batch_shards, make_mesh


class Devices:
    """Puts arrays in their places. Several hosts each do the whole work on their own devices."""

    def __init__(self):
        devices = jax.local_devices()
        self._mesh = make_mesh(devices=devices) if len(devices) > 1 else None

    def copies(self, tree: Any) -> Any:
        """A tree, whole on every device."""
        if self._mesh is None:
            return jax.device_put(tree)
        return jax.device_put(tree, NamedSharding(self._mesh, PartitionSpec()))

    def rows(self, tree: Any) -> Any:
        """Batches, cut along axis 0 where it divides; else whole on every device."""
        if self._mesh is None:
            return jax.device_put(tree)
        count, cut = batch_shards(self._mesh), batch_sharding(self._mesh)
        whole = NamedSharding(self._mesh, PartitionSpec())
        return jax.tree.map(
            lambda x: jax.device_put(x, whole if np.shape(x)[0] % count else cut), tree
        )
