"""Features of many images from a frozen backbone, in batches of one fixed size.

In: uint8 images of one shape. Out: the CLS token and the mean patch token of each, float32 numpy.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dinov2_jax.augment import normalize
from dinov2_jax.models.vit import BackboneOutput
from dinov2_jax.sharding import batch_sharding, batch_shards


class Features(NamedTuple):
    """One row per image, in the order of the images."""

    cls: np.ndarray  # float32 [images, d]
    mean_patch: np.ndarray  # float32 [images, d]


class FeatureExtractor:
    """Computes features; built once, so that each image shape is compiled once."""

    def __init__(
        self,
        apply: Callable[[Any, jax.Array], BackboneOutput],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int = 64,
        mesh: Mesh | None = None,
    ):
        """Binds the network's function.

        Args:
          apply: (parameters, normalised images `[b, height, width, c]`) -> `BackboneOutput`.
          mean: of pixels in [0, 1], one per channel.
          std: likewise.
          batch_size: images at once; the last batch is padded to it.
          mesh: of the parameters. Batches are cut over its batch axes where `batch_size` is a
            multiple of their devices, and replicated otherwise. None: one device. With several
            hosts, each must pass the same images; each gets all the features.
        """
        if batch_size < 1:
            raise ValueError(f"{batch_size=} must be at least 1")
        self.batch_size = batch_size
        self._sharding = None
        if mesh is not None:
            replicated = NamedSharding(mesh, PartitionSpec())
            divisible = batch_size % batch_shards(mesh) == 0
            self._sharding = batch_sharding(mesh) if divisible else replicated

        def features(params, images: jax.Array) -> tuple[jax.Array, ...]:
            with jax.named_scope("features"):
                output = apply(params, normalize(images, mean=mean, std=std))
                cls = output.cls.astype(jnp.float32)
                return cls, output.patches.astype(jnp.float32).mean(axis=1)

        # Replicated results can be read on every host.
        placement = {} if mesh is None else {"out_shardings": replicated}
        self._features = jax.jit(features, **placement)

    def __call__(self, params: Any, images: Iterable[np.ndarray]) -> Features:
        """Features of the images.

        Args:
          params: of the backbone.
          images: uint8 `[height, width, c]` each, all of one shape; any iterable, read once and
            never held as a whole.

        Returns:
          `Features`, in order.

        Raises:
          ValueError: there is no image.
        """
        images = iter(images)
        results = []
        while batch := list(itertools.islice(images, self.batch_size)):
            padding = [np.zeros_like(batch[0])] * (self.batch_size - len(batch))
            found = self._features(params, self._to_device(np.stack(batch + padding)))
            results.append((found, len(batch)))
            if len(results) > 1:  # waits for the last but one: decoding and computing overlap
                results[-2] = _to_host(*results[-2])
        if not results:
            raise ValueError("there must be at least one image to compute features of")
        results[-1] = _to_host(*results[-1])
        return Features(*(np.concatenate(rows) for rows in zip(*results, strict=True)))

    def _to_device(self, batch: np.ndarray) -> jax.Array:
        if self._sharding is None:
            return jnp.asarray(batch)
        return jax.make_array_from_callback(batch.shape, self._sharding, lambda index: batch[index])


def _to_host(found: tuple[jax.Array, ...], num_images: int) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(x)[:num_images] for x in found)
