"""Segmentation without training: each patch takes the classes of the most similar known patches.

In: labelled images, of whose patches a bounded number is kept. Out: for every patch of an image the
share of votes of each class, which then is stretched and averaged like a head's logits.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from dinov2_jax.evals.dense.mask_sets import IGNORED
from dinov2_jax.evals.dense.predict import BatchedMaps, Slide, normalise
from dinov2_jax.evals.dense.resample import resize_bilinear, resize_nearest, scaled_size
from dinov2_jax.evals.dense.windows import cut_windows
from dinov2_jax.model import Model
from dinov2_jax.neighbors import top_k_cosine

_BANK_CHUNK, _QUERY_CHUNK = 16_384, 1_024


def patch_classes(
    classes: np.ndarray, grid: tuple[int, int], patch_size: int, num_classes: int
) -> np.ndarray:
    """The commonest class of each patch `[h * w]`, `IGNORED` where none of its pixels has one.

    Args:
      classes: `[height, width]`, of the image before it was padded to whole patches.
      grid: rows and columns of patches; what they are larger by was added on both sides.
      patch_size: px.
      num_classes: of the set.
    """
    (h, w), (height, width) = grid, classes.shape
    top, left = (h * patch_size - height) // 2, (w * patch_size - width) // 2
    full = np.full((h * patch_size, w * patch_size), IGNORED, np.int64)
    full[top : top + height, left : left + width] = classes
    cells = rearrange(full, "(h p) (w q) -> (h w) (p q)", h=h, w=w)
    rows = np.broadcast_to(np.arange(len(cells))[:, None], cells.shape)
    is_asked = cells != IGNORED
    numbers = rows[is_asked] * num_classes + cells[is_asked]
    votes = np.bincount(numbers, minlength=len(cells) * num_classes).reshape(-1, num_classes)
    return np.where(votes.sum(axis=1) > 0, votes.argmax(axis=1), IGNORED)


class Bank(NamedTuple):
    """Labelled patches.

    Attributes:
      features: float32 `[rows, d]`.
      classes: int32 `[rows]`.
    """

    features: np.ndarray
    classes: np.ndarray


def build_bank(
    images: Iterable[tuple[np.ndarray, np.ndarray]],
    patches_of: Callable[[np.ndarray], np.ndarray],
    *,
    slide: Slide,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int,
    num_classes: int,
    num_images: int,
    limit: int,
    seed: int,
) -> Bank:
    """Patches of the windows of images, about as many of each image.

    Args:
      images: uint8 `[height, width, 3]` and classes `[height, width]` of each.
      patches_of: normalised windows `[b, height, width, 3]` -> patches `[b, h, w, d]`.
      slide: size and windows, which do not overlap here.
      mean, std, patch_size: of the network's input.
      num_classes: of the set.
      num_images: of `images`.
      limit: patches kept at most.
      seed: of which patches are kept.

    Raises:
      ValueError: no patch has a class.
    """
    share, crop = max(limit // num_images, 1), slide.crop_px
    kept = []
    for number, (image, classes) in enumerate(images):
        size = scaled_size(*image.shape[:2], slide.short_side_px)
        image = normalise(resize_bilinear(image, *size), mean, std)
        patches = patches_of(cut_windows(image, crop, crop))
        windows = cut_windows(resize_nearest(classes, *size), crop, crop)
        grid = patches.shape[1:3]
        labels = np.concatenate([patch_classes(x, grid, patch_size, num_classes) for x in windows])
        rows = np.flatnonzero(labels != IGNORED)
        if len(rows) > share:
            rng = np.random.default_rng([seed, number])
            rows = np.sort(rng.choice(rows, share, replace=False))
        flat = rearrange(patches, "b h w d -> (b h w) d")
        kept.append((flat[rows].astype(np.float32), labels[rows].astype(np.int32)))
    bank = Bank(*(np.concatenate(parts)[:limit] for parts in zip(*kept, strict=True)))
    if not len(bank.classes):
        raise ValueError("no patch of the training images has a class; look at --ignore")
    return bank


def chunked(features: np.ndarray) -> np.ndarray:
    """The bank as `top_k_cosine` takes it, `[chunks, rows, d]`, padded."""
    size = min(_BANK_CHUNK, len(features))
    count = -(-len(features) // size)
    return np.pad(features, ((0, count * size - len(features)), (0, 0))).reshape(count, size, -1)


@partial(jax.jit, static_argnames=("num_neighbors", "num_classes", "temperature"))
def vote(
    patches: jax.Array,
    bank: jax.Array,
    classes: jax.Array,
    *,
    num_neighbors: int,
    num_classes: int,
    temperature: float | None,
) -> jax.Array:
    """Shares of the votes of the nearest patches by cosine similarity.

    Args:
      patches: `[n, d]`.
      bank: of `chunked`.
      classes: of the bank's rows, `[rows]`.
      num_neighbors: voters.
      num_classes: of the set.
      temperature: of the softmax over the voters' similarities that weighs them; None: they have
        one vote each.

    Returns:
      `[n, num_classes]`; rows sum to 1.
    """

    def of_chunk(queries: jax.Array) -> jax.Array:
        similarities, rows = top_k_cosine(queries, bank, k=num_neighbors, num_rows=len(classes))
        equal = jnp.full(similarities.shape, 1 / num_neighbors)
        weights = equal if temperature is None else jax.nn.softmax(similarities / temperature)
        votes = jnp.zeros((len(queries), num_classes))
        return votes.at[jnp.arange(len(queries))[:, None], classes[rows]].add(weights)

    patches = patches.astype(jnp.float32)
    size = min(_QUERY_CHUNK, len(patches))
    padding = -len(patches) % size
    chunks = jnp.pad(patches, ((0, padding), (0, 0))).reshape(-1, size, patches.shape[-1])
    return jax.lax.map(of_chunk, chunks).reshape(-1, num_classes)[: len(patches)]


def patch_maps(model: Model, *, batch_size: int) -> BatchedMaps:
    """Patches `[b, h, w, d]` of the last layer, normalised, of windows."""
    return BatchedMaps(model, lambda _, params, x: _patches(model, params, x), (), batch_size)


def voting_maps(
    model: Model,
    bank: Bank,
    *,
    num_neighbors: int,
    num_classes: int,
    temperature: float | None,
    batch_size: int,
) -> BatchedMaps:
    """Shares of votes `[b, h, w, num_classes]` of windows; see `vote`."""

    def compute(bank, params, images):
        patches = _patches(model, params, images)
        flat = rearrange(patches, "b h w d -> (b h w) d")
        shares = vote(
            flat,
            *bank,
            num_neighbors=num_neighbors,
            num_classes=num_classes,
            temperature=temperature,
        )
        return shares.reshape(*patches.shape[:3], num_classes)

    chunks = (chunked(bank.features), bank.classes)
    return BatchedMaps(model, compute, chunks, batch_size)


def _patches(model: Model, params: Any, images: jax.Array) -> jax.Array:
    h, w = model.grid(*images.shape[1:3])
    return rearrange(model.apply(params, images).patches, "b (h w) d -> b h w d", h=h, w=w)
