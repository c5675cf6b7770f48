"""Label propagation: masks carried from frame to frame by similar patches, without training.

Behaviour follows dino/eval_video_segmentation.py (Caron et al., 2021, arXiv:2104.14294; Apache-2.0)
after Jabri et al., 2020: each patch takes the labels of its most similar patches nearby, in the
first frame and in the last few.
"""

import collections
from collections.abc import Iterable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from PIL import Image


def propagate(
    features: Iterable[np.ndarray],
    first_labels: np.ndarray,
    *,
    num_context: int = 7,
    num_neighbors: int = 5,
    radius: int = 12,
    temperature: float = 0.1,
) -> Iterator[np.ndarray]:
    """Labels of every frame after the first.

    Args:
      features: of each frame, patches `[h, w, d]`, any scale (similarity is cosine).
      first_labels: shares of each class in the first frame's patches, float32 `[h, w, c]`.
      num_context: frames before the current one that labels come from, beside the first.
      num_neighbors: patches whose labels are taken, weighted by exp(similarity / temperature).
      radius: of the square that they lie in, in patches; 0: anywhere.
      temperature: of the weights.

    Yields:
      Shares of each class, float32 `[h, w, c]`; they sum to 1.
    """
    features = iter(features)
    first = next(features)
    queue = collections.deque(maxlen=num_context)
    h, w, d = first.shape
    for current in features:
        # Places that no frame has taken yet do not count: one shape, one compilation.
        context = np.zeros((1 + num_context, h, w, d), np.float32)
        labels = np.zeros((1 + num_context, *first_labels.shape), np.float32)
        for i, (frame, shares) in enumerate([(first, first_labels), *queue]):
            context[i], labels[i] = frame, shares
        found = np.asarray(
            labels_of_neighbors(
                current,
                context,
                labels,
                np.arange(1 + num_context) < 1 + len(queue),
                num_neighbors=min(num_neighbors, (1 + num_context) * h * w),
                radius=radius,
                temperature=temperature,
            )
        )
        queue.append((current, found))
        yield found


@partial(jax.jit, static_argnames=("num_neighbors", "radius"))
def labels_of_neighbors(
    current: jax.Array,
    context: jax.Array,
    labels: jax.Array,
    is_there: jax.Array,
    *,
    num_neighbors: int,
    radius: int,
    temperature: float,
) -> jax.Array:
    """Labels of one frame's patches, the mean over their neighbours' labels.

    Patches as similar as the last of the neighbours count too, as in the reference.

    Args:
      current: `[h, w, d]`.
      context: `[frames, h, w, d]`.
      labels: `[frames, h, w, c]`.
      is_there: bool `[frames]`: which of them count.
      num_neighbors, radius, temperature: see `propagate`.

    Returns:
      float32 `[h, w, c]`.
    """
    h, w, _ = current.shape
    sources = rearrange(_unit_length(context), "f h w d -> (f h w) d")
    source_labels = rearrange(labels, "f h w c -> (f h w) c")
    rows, cols = jnp.arange(h), jnp.arange(w)
    reach = radius or max(h, w)
    near_cols = jnp.abs(cols[:, None] - cols) <= reach  # [targets, sources]

    def one_row(row_and_targets):
        row, targets = row_and_targets  # a row of the frame at a time bounds the memory
        similarities = jnp.einsum(
            "td,sd->ts", targets, sources, precision=jax.lax.Precision.HIGHEST
        )
        near_rows = jnp.abs(rows - row) <= reach
        counts = is_there[:, None, None] & near_rows[:, None] & near_cols[:, None, None]
        counts = rearrange(counts, "t f h w -> t (f h w)")
        weights = jnp.where(counts, jnp.exp(similarities / temperature), 0)
        # The minimum: of a slice [:, -1:] XLA makes a full sort, eight times as slow on CPU.
        last = jax.lax.top_k(weights, num_neighbors)[0].min(axis=1, keepdims=True)
        weights = jnp.where(weights >= last, weights, 0)
        weights /= weights.sum(axis=1, keepdims=True)
        return jnp.matmul(weights, source_labels, precision=jax.lax.Precision.HIGHEST)

    return jax.lax.map(one_row, (rows, _unit_length(current)))


def labels_from_mask(mask: np.ndarray, *, num_objects: int, grid: tuple[int, int]) -> np.ndarray:
    """Each patch's class as the reference takes it, the mask's nearest pixel.

    Args:
      mask: object numbers uint8 `[height, width]`; beyond `num_objects` is background.
      num_objects: classes beside the background.
      grid: rows and columns of patches.

    Returns:
      float32 `[h, w, 1 + num_objects]`, one of each row 1.
    """
    small = Image.fromarray(np.where(mask > num_objects, 0, mask).astype(np.uint8))
    small = np.asarray(small.resize(grid[::-1], Image.Resampling.NEAREST))
    return np.eye(1 + num_objects, dtype=np.float32)[small]


def mask_from_labels(labels: np.ndarray, *, patch_size: int, shape: tuple[int, int]) -> np.ndarray:
    """The mask of a frame: shares interpolated to pixels, each class from 0 to 1, the largest.

    Args:
      labels: float32 `[h, w, c]`.
      patch_size: px, of the frame as the network saw it.
      shape: height and width of the mask.

    Returns:
      Object numbers uint8 `[height, width]`.
    """
    mask = np.asarray(_largest(jnp.asarray(labels), patch_size)).astype(np.uint8)
    return np.asarray(Image.fromarray(mask).resize(shape[::-1], Image.Resampling.NEAREST))


@partial(jax.jit, static_argnums=1)
def _largest(labels: jax.Array, patch_size: int) -> jax.Array:
    h, w, c = labels.shape
    shares = jax.image.resize(labels, (h * patch_size, w * patch_size, c), "linear")
    low, high = shares.min(axis=(0, 1)), shares.max(axis=(0, 1))
    scaled = (shares - low) / jnp.where(high > low, high - low, 1)
    # A class that is nowhere stays at 0; one that is everywhere wins.
    scaled = jnp.where((high > 0) & (high == low), 1, scaled)
    return scaled.argmax(axis=-1)


def _unit_length(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
