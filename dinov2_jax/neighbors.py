"""Exact nearest neighbours by cosine similarity, the bank in chunks, on the device.

In: features of queries and of a bank, `[q, d]` and `[b, d]`. Out: the k best similarities and bank
rows of each query. Serves kNN evaluation, retrieval and curation.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def nearest_neighbors(
    queries: np.ndarray,
    bank: np.ndarray,
    *,
    k: int,
    bank_chunk_size: int = 16_384,
    query_chunk_size: int = 1_024,
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of the bank most similar to each query, best first.

    Equal similarities are ordered by bank row. A vector of zeros has similarity 0 to everything.
    Memory on the device: the bank, and `query_chunk_size * (bank_chunk_size + 2 k)` floats twice.

    Args:
      queries: `[q, d]`, any scale.
      bank: `[b, d]`, any scale.
      k: neighbours, 1 to b.
      bank_chunk_size: rows of the bank compared at once.
      query_chunk_size: queries sent to the device at once.

    Returns:
      Cosine similarities float32 `[q, k]` and bank rows int32 `[q, k]`.

    Raises:
      ValueError: k is out of range, widths differ, or a feature is not finite.
    """
    queries, bank = _checked(queries, "queries"), _checked(bank, "bank")
    if queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f"{queries.shape=} and {bank.shape=} must have the same width; "
            "compute both with the same network"
        )
    if not 1 <= k <= len(bank):
        raise ValueError(f"{k=} must be between 1 and the bank's {len(bank)} rows; lower k")
    bank_chunk_size = min(bank_chunk_size, len(bank))
    query_chunk_size = min(query_chunk_size, max(len(queries), 1))
    chunks = _chunks(bank, bank_chunk_size)
    similarities = np.empty((len(queries), k), np.float32)
    indices = np.empty((len(queries), k), np.int32)
    for start in range(0, len(queries), query_chunk_size):
        piece = queries[start : start + query_chunk_size]
        padding = ((0, query_chunk_size - len(piece)), (0, 0))  # one shape, one compilation
        found = top_k_cosine(np.pad(piece, padding), chunks, k=k, num_rows=len(bank))
        rows = slice(start, start + len(piece))
        similarities[rows], indices[rows] = (np.asarray(x)[: len(piece)] for x in found)
    return similarities, indices


@partial(jax.jit, static_argnames=("k", "num_rows"))
def top_k_cosine(
    queries: jax.Array, bank: jax.Array, *, k: int, num_rows: int
) -> tuple[jax.Array, jax.Array]:
    """The k best of all chunks: each chunk's best are merged into the best so far.

    Args:
      queries: float32 `[q, d]`.
      bank: float32 `[chunks, rows, d]`, padded at the end.
      k: neighbours, at most num_rows.
      num_rows: rows of the bank that are not padding.

    Returns:
      Similarities `[q, k]`, descending, and bank rows int32 `[q, k]`.
    """
    queries = _unit_length(queries)
    num_chunks, chunk_size, _ = bank.shape

    def merge(best, chunk_and_start):
        chunk, start = chunk_and_start
        # Neighbours may differ in the sixth digit: bfloat16 products would reorder them.
        similarities = jnp.einsum(
            "qd,bd->qb", queries, _unit_length(chunk), precision=jax.lax.Precision.HIGHEST
        )
        rows = start + jnp.arange(chunk_size, dtype=jnp.int32)
        similarities = jnp.where(rows < num_rows, similarities, -jnp.inf)
        # top_k prefers the earlier of equals, and the best so far come from earlier rows.
        similarities = jnp.concatenate([best[0], similarities], axis=1)
        rows = jnp.concatenate(
            [best[1], jnp.broadcast_to(rows, (len(queries), chunk_size))], axis=1
        )
        similarities, picked = jax.lax.top_k(similarities, k)
        return (similarities, jnp.take_along_axis(rows, picked, axis=1)), None

    nothing = (
        jnp.full((len(queries), k), -jnp.inf, jnp.float32),
        jnp.full((len(queries), k), num_rows, jnp.int32),
    )
    starts = chunk_size * jnp.arange(num_chunks, dtype=jnp.int32)
    return jax.lax.scan(merge, nothing, (bank, starts))[0]


def _checked(features: np.ndarray, name: str) -> np.ndarray:
    features = np.asarray(features, np.float32)
    if features.ndim != 2:
        raise ValueError(f"{name} {features.shape} must be [rows, width]; flatten other axes")
    is_bad = ~np.isfinite(features).all(axis=1)
    if is_bad.any():
        raise ValueError(
            f"{name}: {is_bad.sum()} of {len(features)} rows are not finite, the first is row "
            f"{int(is_bad.argmax())}; the network or its input has produced NaN or infinity"
        )
    return features


def _chunks(bank: np.ndarray, chunk_size: int) -> jax.Array:
    num_chunks = -(-len(bank) // chunk_size)
    padding = ((0, num_chunks * chunk_size - len(bank)), (0, 0))
    return jnp.asarray(np.pad(bank, padding).reshape(num_chunks, chunk_size, bank.shape[1]))


def _unit_length(x: jax.Array) -> jax.Array:
    # Divided by the largest entry first: squares of 1e30 or 1e-30 leave the range of float32.
    x = x / jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), jnp.finfo(x.dtype).tiny)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
