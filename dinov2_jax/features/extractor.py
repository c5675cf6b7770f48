"""Features of many images from a frozen backbone, in batches of one fixed size.

In: uint8 images of one shape. Out: named arrays with a row for each image, numpy.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dinov2_jax.augment import normalize
from dinov2_jax.models.vit import BackboneOutput
from dinov2_jax.sharding import batch_sharding, batch_shards

Arrays = dict[str, np.ndarray]


def mean_patch(patches: jax.Array) -> jax.Array:
    """Mean of patch tokens `[b, n, d]`, float32 `[b, d]`."""
    return patches.astype(jnp.float32).mean(axis=1)


def cls_and_mean_patch(
    apply: Callable[[Any, jax.Array], BackboneOutput],
) -> Callable[[Any, jax.Array], dict[str, jax.Array]]:
    """`cls` and `mean_patch`, float32 `[b, d]`, of a network's output: for `FeatureExtractor`."""

    def compute(params, images: jax.Array) -> dict[str, jax.Array]:
        output = apply(params, images)
        return {"cls": output.cls.astype(jnp.float32), "mean_patch": mean_patch(output.patches)}

    return compute


class FeatureExtractor:
    """Computes features; built once, so that each image shape is compiled once."""

    def __init__(
        self,
        compute: Callable[[Any, jax.Array], dict[str, jax.Array]],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int = 64,
        mesh: Mesh | None = None,
    ):
        """Binds the network's function.

        Args:
          compute: (parameters, normalised images `[b, height, width, c]`) -> arrays `[b, ..]`.
          mean: of pixels in [0, 1], one per channel.
          std: likewise.
          batch_size: images at once; a smaller batch is padded to it.
          mesh: of the parameters. Batches are cut over its batch axes where `batch_size` is a
            multiple of their devices, and replicated otherwise. None: one device. With several
            hosts, each must pass the same images; each gets all the features.
        """
        if batch_size < 1:
            raise ValueError(f"{batch_size=} must be at least 1")
        self.batch_size = batch_size
        self._sharding, placement = None, {}
        if mesh is not None:
            replicated = NamedSharding(mesh, PartitionSpec())
            divisible = batch_size % batch_shards(mesh) == 0
            self._sharding = batch_sharding(mesh) if divisible else replicated
            # Replicated results can be read on every host; on one, they would only be copied.
            results = replicated if mesh.is_multi_process else self._sharding
            placement = {"out_shardings": results}

        def features(params, images: jax.Array) -> dict[str, jax.Array]:
            with jax.named_scope("features"):
                return compute(params, normalize(images, mean=mean, std=std))

        self._features = jax.jit(features, **placement)

    def __call__(self, params: Any, images: Iterable[np.ndarray]) -> Arrays:
        """Features of the images.

        Args:
          params: of the backbone.
          images: uint8 `[height, width, c]` each, all of one shape; any iterable, read once and
            never held as a whole.

        Returns:
          The arrays of `compute`, `[images, ..]`, in order.

        Raises:
          ValueError: there is no image.
        """
        images = iter(images)
        batches = iter(lambda: list(itertools.islice(images, self.batch_size)), [])
        results = list(self.stream(params, batches))
        if not results:
            raise ValueError("there must be at least one image to compute features of")
        return {name: np.concatenate([rows[name] for rows in results]) for name in results[0]}

    def stream(self, params: Any, batches: Iterable[Sequence[np.ndarray]]) -> Iterator[Arrays]:
        """Features of batch after batch, in order.

        A result is given out when the next batch has been sent to the device, so that the batch
        after it is decoded while this one computes.

        Args:
          params: of the backbone.
          batches: of at most `batch_size` images each, as for `__call__`; an empty one gives {}.
        """
        under_way = None
        for batch in batches:
            sent = (self._send(params, batch), len(batch))
            if under_way is not None:
                yield _to_host(*under_way)
            under_way = sent
        if under_way is not None:
            yield _to_host(*under_way)

    def _send(self, params: Any, batch: Sequence[np.ndarray]) -> dict[str, jax.Array]:
        if len(batch) == 0:
            return {}
        padding = [np.zeros_like(batch[0])] * (self.batch_size - len(batch))
        images = np.stack([*batch, *padding])
        if self._sharding is None:
            return self._features(params, jnp.asarray(images))
        return self._features(
            params,
            jax.make_array_from_callback(images.shape, self._sharding, lambda index: images[index]),
        )


def _to_host(found: dict[str, jax.Array], num_images: int) -> Arrays:
    return {name: np.asarray(x)[:num_images] for name, x in found.items()}
