"""Batches for the training of a head: random views through the network, or cached fixed views.

A data set here has a length, `read(i) -> (image, target)` and `pairs`; a view makes both smaller.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dinov2_jax.data.ahead import map_ahead
from dinov2_jax.data.records import Record, Source
from dinov2_jax.evals.dense.devices import Devices
from dinov2_jax.evals.dense.heads import DenseHead, context
from dinov2_jax.evals.dense.train import Batch, image_numbers, view_rng
from dinov2_jax.features.read import FeatureSet
from dinov2_jax.model import Model
from dinov2_jax.models.vit import BackboneOutput

# image, target -> image, target
FixedView = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
_TARGETS_BYTES = 1 << 30
_TOKENS = ("cls", "mean", "patches")


def random_batches(
    dataset: Any,
    view: Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]],
    model: Model,
    head: DenseHead,
    *,
    batch_size: int,
    images_at_once: int,
    seed: int,
    num_threads: int,
    devices: Devices,
) -> Callable[[int], Iterator[Batch]]:
    """Batches of random views, their features computed when they are needed.

    Args:
      dataset: of images and targets.
      view: (image, target, random numbers) -> normalised image and target, each of one shape.
      model, head: which tokens of what.
      batch_size: images of a batch.
      images_at_once: that the network takes.
      seed: of order and views.
      num_threads: that decode.
      devices: where features go.

    Returns:
      Batches from a step on.
    """
    embed = jax.jit(functools.partial(head.embed, model))
    params = devices.copies(model.params)

    def one(place_and_number: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        place, number = place_and_number
        return view(*dataset.read(number), view_rng(place, seed=seed))

    def places(start: int) -> Iterator[tuple[int, int]]:
        step = start
        while True:
            numbers = image_numbers(step, batch_size=batch_size, num_images=len(dataset), seed=seed)
            yield from enumerate(numbers, step * batch_size)
            step += 1

    def features(images: np.ndarray) -> list[BackboneOutput]:
        pieces = [images[i : i + images_at_once] for i in range(0, batch_size, images_at_once)]
        found = [embed(params, devices.rows(piece)) for piece in pieces]
        if len(found) == 1:
            return found[0]
        return devices.rows(jax.tree.map(lambda *parts: jnp.concatenate(parts), *found))

    def batches(start: int) -> Iterator[Batch]:
        views = map_ahead(one, places(start), num_threads=num_threads, ahead=2 * batch_size)
        with contextlib.closing(views):
            while True:
                images, targets = zip(*(next(views) for _ in range(batch_size)), strict=True)
                yield features(np.stack(images)), np.stack(targets)

    return batches


class ViewSource(Source):
    """Images of a data set as a fixed view shows them: what is cached of a network is of these."""

    def __init__(self, dataset: Any, view: FixedView, *, at: str, settings: str):
        """Binds a data set, where it is, and a text that says what the view is."""
        self.path, self.kind, self.rejected = at, "fixed views of", []
        self._dataset, self._view, self._settings = dataset, view, settings

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Record:
        image, _ = self._view(*self._dataset.read(index))
        return Record(np.ascontiguousarray(image), self.name(index), None)

    def name(self, index: int) -> str:
        return f"{self._dataset.pairs[index].image} {self._settings}"


def cached_batches(
    dataset: Any,
    view: FixedView,
    features: FeatureSet,
    head: DenseHead,
    *,
    batch_size: int,
    seed: int,
    devices: Devices,
) -> Callable[[int], Iterator[Batch]]:
    """Batches of fixed views whose features are on disk; arguments and result as above.

    Args:
      features: of `cached_what(head)`, of the `ViewSource` of the data set.
    """
    size = view(*dataset.read(0))[1].nbytes

    @functools.lru_cache(maxsize=max(_TARGETS_BYTES // size, 1))
    def target(number: int) -> np.ndarray:
        return view(*dataset.read(number))[1]

    blocks = sorted(set(head.layers))

    def batches(start: int) -> Iterator[Batch]:
        step = start
        while True:
            numbers = image_numbers(step, batch_size=batch_size, num_images=len(dataset), seed=seed)
            cls, mean, patches = (features[f"layers_{x}"][numbers] for x in _TOKENS)
            outputs = [
                BackboneOutput(
                    cls=context(cls[:, i], mean[:, i]),
                    registers=patches[:, i, :0],
                    patches=patches[:, i],
                )
                for i in map(blocks.index, head.layers)
            ]
            yield devices.rows(outputs), np.stack([target(number) for number in numbers])
            step += 1

    return batches


def cached_what(head: DenseHead) -> str:
    """The tokens that a head takes, as `features.outputs.parse_what` reads them."""
    blocks = "+".join(map(str, sorted(set(head.layers))))
    blocks += "+" * ("+" not in blocks)
    return f"layers={blocks},layers_patches={blocks}"
