"""Exact nearest neighbours by cosine similarity: the bank in chunks, over all devices of a mesh.

In: features of queries and of a bank, `[q, d]` and `[b, d]`, in memory or mapped from disk. Out:
the k best similarities and bank rows of each query. Serves kNN evaluation, retrieval and curation.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dinov2_jax.neighbors_plan import (
    BANK_CHUNK_SIZE,
    QUERY_CHUNK_SIZE,
    Plan,
    local_mesh,
    make_plan,
)


def seconds_per_step(plan: Plan, *, mesh: Mesh | None = None) -> float:
    """Seconds that one of `plan.num_steps` takes, by a timed search for noise in a chunk a device.

    Reading a bank from disk comes on top.
    """
    mesh = mesh or local_mesh()
    rows = np.random.default_rng(0).standard_normal((plan.bank_chunk_size, plan.width), np.float32)
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    shape = (mesh.size, *rows.shape)
    piece = jax.make_array_from_callback(shape, sharding, lambda _: rows[None])
    queries = _padded(rows[: plan.query_chunk_size], plan.query_chunk_size)
    best = _nothing(plan.query_chunk_size, plan.k, num_rows=mesh.size * len(rows))

    def run() -> float:
        started = time.perf_counter()
        found = _search(mesh, queries, *best, piece, np.int32(0), np.int32(mesh.size * len(rows)))
        jax.block_until_ready(found)
        return time.perf_counter() - started

    with jax.set_mesh(mesh):
        run()  # compiles
        return plan.chunks_per_device * min(run(), run())


def nearest_neighbors(
    queries: Any,
    bank: Any,
    *,
    k: int,
    bank_chunk_size: int = BANK_CHUNK_SIZE,
    query_chunk_size: int = QUERY_CHUNK_SIZE,
    mesh: Mesh | None = None,
    piece_bytes: int | None = None,
    on_step: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of the bank most similar to each query, best first.

    Equal similarities are ordered by bank row. A vector of zeros has similarity 0 to everything.
    A device compares whole chunks of the bank, which are the same for any number of devices and
    pieces; so are the results. For time and memory see `Plan`.

    Args:
      queries: `[q, d]`, any scale: an array, or anything that gives rows by slices, such as
        `features.read.ShardedArray`.
      bank: `[b, d]`, likewise; what does not fit the devices passes through them in pieces.
      k: neighbours, 1 to b.
      bank_chunk_size: rows of the bank compared at once on a device.
      query_chunk_size: queries sent to the devices at once.
      mesh: whose devices share the bank. Of several hosts, each must call with the same arguments;
        each reads its own rows of the bank and gets all results. None: the devices of this host.
      piece_bytes: of the bank on a device at once; None: half of what is free there.
      on_step: called after each of `Plan.num_steps` with its number, from 1.

    Returns:
      Cosine similarities float32 `[q, k]` and bank rows int32 `[q, k]`.

    Raises:
      ValueError: k is out of range, widths differ, or a feature is not finite.
    """
    queries, bank = _rows(queries, "queries"), _rows(bank, "bank")
    if queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f"{queries.shape=} and {bank.shape=} must have the same width; "
            "compute both with the same network"
        )
    if not 1 <= k <= len(bank):
        raise ValueError(f"{k=} must be between 1 and the bank's {len(bank)} rows; lower k")
    mesh = mesh or local_mesh()
    plan = make_plan(
        len(queries),
        *bank.shape,
        k=k,
        bank_chunk_size=bank_chunk_size,
        query_chunk_size=query_chunk_size,
        mesh=mesh,
        piece_bytes=piece_bytes,
    )
    size = plan.query_chunk_size
    chunks = [slice(i, min(i + size, len(queries))) for i in range(0, len(queries), size)]
    for rows in chunks:
        is_bad = ~np.isfinite(_take(queries, rows)).all(axis=1)
        _check_finite("queries", rows.start, is_bad.sum(), is_bad.argmax(), of=len(queries))
    similarities, indices = _nothing(len(queries), k, num_rows=len(bank))
    steps = 0
    for first_row in range(0, len(bank), plan.piece_rows):
        with jax.set_mesh(mesh):  # a caller's may be another
            piece = _put_piece(bank, first_row, plan, mesh)
        for rows in chunks:
            arrays = (_take(queries, rows), similarities[rows], indices[rows])
            arrays = (_padded(x, size) for x in arrays)
            with jax.set_mesh(mesh):
                found = _search(mesh, *arrays, piece, np.int32(first_row), np.int32(len(bank)))
            count = rows.stop - rows.start
            similarities[rows], indices[rows] = (np.asarray(x)[:count] for x in found)
            steps += 1
            if on_step is not None:
                on_step(steps)
    return similarities, indices


def top_k_cosine(
    queries: jax.Array, bank: jax.Array, *, k: int, num_rows: int
) -> tuple[jax.Array, jax.Array]:
    """`nearest_neighbors` on one device, as a pure function for a caller's own `jax.jit`.

    Args:
      queries: float32 `[q, d]`.
      bank: float32 `[chunks, rows, d]`, padded at the end.
      k: neighbours, at most num_rows.
      num_rows: rows of the bank that are not padding.

    Returns:
      Similarities `[q, k]`, descending, and bank rows int32 `[q, k]`.
    """
    best = tuple(jnp.asarray(x) for x in _nothing(len(queries), k, num_rows=num_rows))
    return _best_of_chunks(_unit_length(queries), best, _unit_length(bank), 0, num_rows)


@partial(jax.jit, static_argnums=0)
def _search(
    mesh: Mesh,
    queries: jax.Array,  # float32 [q, d]
    similarities: jax.Array,  # float32 [q, k]: the best of all rows before this piece
    indices: jax.Array,  # int32 [q, k]: their rows
    piece: jax.Array,  # float32 [chunks, rows, d], of unit length, cut over the devices
    first_row: jax.Array,  # of the piece
    num_rows: jax.Array,  # of the bank: what comes after them is padding
) -> tuple[jax.Array, jax.Array]:
    """The best after one more piece of the bank: every device's best, merged."""
    axes, k = mesh.axis_names, similarities.shape[1]

    def on_device(queries, similarities, indices, chunks, first_row, num_rows):
        device = jax.lax.axis_index(axes)
        # The first device goes on with what was found before: its rows come next.
        best = (
            jnp.where(device == 0, similarities, -jnp.inf),
            jnp.where(device == 0, indices, num_rows),
        )
        first_row += device * chunks.shape[0] * chunks.shape[1]
        best = _best_of_chunks(queries, best, chunks, first_row, num_rows)
        # In the order of devices, and so of rows: the earlier of equals stays first.
        return _top_k(*(jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in best), k)

    whole, cut = PartitionSpec(), PartitionSpec(axes)
    run = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(whole, whole, whole, cut, whole, whole),
        out_specs=(whole, whole),
        check_vma=False,
    )
    return run(_unit_length(queries), similarities, indices, piece, first_row, num_rows)


def _best_of_chunks(queries, best, chunks, first_row, num_rows):
    """The best of all chunks `[chunks, rows, d]`: each chunk's are merged into the best so far."""
    num_chunks, chunk_size, _ = chunks.shape

    def merge(best, chunk_and_start):
        chunk, start = chunk_and_start
        # Neighbours may differ in the sixth digit: bfloat16 products would reorder them.
        similarities = jnp.einsum("qd,bd->qb", queries, chunk, precision=jax.lax.Precision.HIGHEST)
        similarities = jnp.where(similarities == 0, 0.0, similarities)  # -0.0 is sorted below 0.0
        rows = start + jnp.arange(chunk_size, dtype=jnp.int32)
        similarities = jnp.where(rows < num_rows, similarities, -jnp.inf)
        rows = jnp.broadcast_to(rows, similarities.shape)
        # The best so far come from earlier rows.
        similarities = jnp.concatenate([best[0], similarities], axis=1)
        rows = jnp.concatenate([best[1], rows], axis=1)
        return _top_k(similarities, rows, best[0].shape[1]), None

    starts = first_row + chunk_size * jnp.arange(num_chunks, dtype=jnp.int32)
    return jax.lax.scan(merge, best, (chunks, starts))[0]


def _top_k(similarities, rows, k):
    similarities, picked = jax.lax.top_k(similarities, k)  # the earlier of equals comes first
    return similarities, jnp.take_along_axis(rows, picked, axis=1)


def _put_piece(bank: Any, first_row: int, plan: Plan, mesh: Mesh) -> jax.Array:
    """Rows of the bank at unit length, `[chunks, rows, d]` over the devices, padded at the end."""
    size = plan.bank_chunk_size
    num_rows = min(plan.piece_rows, plan.num_rows - first_row)
    num_chunks = -(-num_rows // (size * mesh.size)) * mesh.size

    def rows_of(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(num_chunks)
        rows = _take(bank, slice(first_row + start * size, first_row + stop * size))
        return _padded(rows, (stop - start) * size).reshape(stop - start, size, plan.width)

    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    shape = (num_chunks, size, plan.width)
    piece = jax.make_array_from_callback(shape, sharding, rows_of)
    piece, num_bad, first_bad = _unit_piece(piece)
    _check_finite("bank", first_row, int(num_bad), int(first_bad), of=plan.num_rows)
    return piece


@partial(jax.jit, donate_argnums=0)
def _unit_piece(piece: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The piece at unit length; how many of its rows are not finite, and which is the first."""
    is_bad = ~jnp.isfinite(piece).all(axis=-1).reshape(-1)
    return _unit_length(piece), is_bad.sum(), is_bad.argmax()


def _unit_length(x: jax.Array) -> jax.Array:
    # Divided by the largest entry first: squares of 1e30 or 1e-30 leave the range of float32.
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    x = x / jnp.where(largest < jnp.finfo(x.dtype).tiny, 1, largest)
    # Now a length is 1 or more, or 0. No smaller bound: XLA may multiply both divisors, and the
    # product of two small ones is 0.
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1)


def _check_finite(name: str, start: int, num_bad: int, first_bad: int, *, of: int) -> None:
    if num_bad:
        raise ValueError(
            f"{name}: {num_bad} of {of} rows are not finite, the first is row "
            f"{start + first_bad}; the network or its input has produced NaN or infinity"
        )


def _rows(features: Any, name: str) -> Any:
    features = features if hasattr(features, "shape") else np.asarray(features)
    if len(features.shape) != 2:
        raise ValueError(f"{name} {features.shape} must be [rows, width]; flatten other axes")
    return features


def _nothing(num_queries: int, k: int, *, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.full((num_queries, k), -np.inf, np.float32),
        np.full((num_queries, k), num_rows, np.int32),
    )


def _take(features: Any, rows: slice) -> np.ndarray:
    return np.asarray(features[rows], np.float32)


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    return np.pad(rows, ((0, size - len(rows)), (0, 0)))  # one shape, one compilation
