"""A head for a data set: features from views or from the cache, the training, the file."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from dinov2_jax import distributed
from dinov2_jax.evals.dense.devices import Devices
from dinov2_jax.evals.dense.feed import (
    FixedView,
    ViewSource,
    cached_batches,
    cached_what,
    random_batches,
)
from dinov2_jax.evals.dense.heads import DenseHead, save_head
from dinov2_jax.evals.dense.train import Training, train_head
from dinov2_jax.features.read import FeatureSet
from dinov2_jax.model import Model

TRAINING_FILE = "training.safetensors"
View = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Views:
    """What a head is trained on.

    Attributes:
      random: (image, target, random numbers) -> normalised image and target of `size_px`.
      fixed: (image, target) -> the same of the cached training, not normalised.
      size_px: height and width of both.
      settings: a text that says what the fixed view is.
    """

    random: View
    fixed: FixedView
    size_px: tuple[int, int]
    settings: str


def fit_head(
    model: Model,
    head: DenseHead,
    dataset: Any,
    views: Views,
    *,
    training: Training,
    features: Callable[..., FeatureSet] | None,
    batch_size: int,
    images_at_once: int,
    seed: int,
    num_threads: int,
    out: pathlib.Path,
    at: str,
    begin_again: bool,
    request: Mapping[str, Any],
    facts: Mapping[str, Any],
    pth: bool,
    is_shown: bool,
) -> Any:
    """Trains a head and writes it.

    Args:
      model: frozen.
      head: to be trained.
      dataset: of images and targets.
      views: of them.
      training: settings.
      features: (source, what, sizes) -> features from the cache; None: they are computed for every
        view, at random.
      batch_size: images of a step.
      images_at_once: that the network takes.
      seed: of everything.
      num_threads: that decode.
      out: the folder; `training.safetensors` is what an interrupted training goes on from.
      at: where the data set is.
      begin_again: whether an interrupted training is thrown away.
      request: what the result depends on besides, JSON.
      facts: for the head's metadata.
      pth: also write `head.pth`.
      is_shown: whether progress is.

    Returns:
      Its variables.

    Raises:
      ValueError, KeyboardInterrupt: see `train_head`.
    """
    devices, grid = Devices(), model.grid(*views.size_px)
    if features is None:
        batches = random_batches(
            dataset,
            views.random,
            model,
            head,
            batch_size=batch_size,
            images_at_once=images_at_once,
            seed=seed,
            num_threads=num_threads,
            devices=devices,
        )
    else:
        source = ViewSource(dataset, views.fixed, at=at, settings=views.settings)
        found = features(
            source,
            what=cached_what(head),
            norm=head.norm,
            resize_size_px=min(views.size_px),
            crop=False,
        )
        grid = model.grid(*found.index["image_shape"][:2])
        batches = cached_batches(
            dataset,
            views.fixed,
            found,
            head,
            batch_size=batch_size,
            seed=seed,
            devices=devices,
        )
    out.mkdir(parents=True, exist_ok=True)
    if begin_again:
        distributed.on_primary(lambda: (out / TRAINING_FILE).unlink(missing_ok=True))
    variables = train_head(
        head.module,
        head.init(jax.random.key(seed), model.spec.embed_dim),
        batches,
        grid=grid,
        training=training,
        file=out / TRAINING_FILE,
        request={
            **request,
            "weights_sha256": model.weights_sha256,
            "network": repr(model.spec),
            "compute_dtype": model.dtype.name,
            "images": len(dataset),
            # Where its files are and what their numbers mean: a unit, or what is ignored.
            "dataset_sha256": hashlib.sha256(repr(dataset).encode()).hexdigest(),
            "batch_size": batch_size,
            "seed": seed,
            "view": views.settings,
        },
        devices=devices,
        is_shown=is_shown,
    )
    steps = training.schedule.total_steps
    distributed.on_primary(lambda: save_head(out, variables, facts=facts, num_steps=steps, pth=pth))
    return variables
