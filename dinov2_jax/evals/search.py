"""The search for neighbours as a task runs it: over all devices, planned aloud, with a bar."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from dinov2_jax.neighbors import nearest_neighbors, seconds_per_step
from dinov2_jax.neighbors_plan import QUERY_CHUNK_SIZE, Plan, make_plan
from dinov2_jax.progress import Display, format_secs
from dinov2_jax.sharding import make_mesh

# Below so many chunks of queries times chunks of bank on a device, timing one would take longer
# than it is worth.
_TIMED_FROM = 16
# Of whole rankings at once, at 8 bytes for each query and row of the bank; devices need a few times
# as much to merge them.
_RANKED_BYTES = 64 * 2**20


def search(
    queries: Any, bank: Any, *, k: int, say: Callable[[str], None], is_shown: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """`nearest_neighbors` on all devices of all hosts; says before what it will take.

    Args:
      queries, bank, k: see `nearest_neighbors`.
      say: prints a line.
      is_shown: whether progress is shown.

    Raises:
      ValueError: as `nearest_neighbors`.
    """
    settings = dict(num_queries=len(queries), k=k, at_once=QUERY_CHUNK_SIZE, is_shown=is_shown)
    (found,) = _search([queries], bank, say=say, **settings)
    return found


def rankings(
    queries: Any, bank: Any, *, say: Callable[[str], None], is_shown: bool = True
) -> Iterator[np.ndarray]:
    """All rows of the bank for one query after the other, best first: int32 `[b]` each.

    Only a few are in memory at a time: those of all queries would take 8 bytes for each pair. An
    array is part of a larger one; copy what is to be kept of it.

    Args:
      others: see `search`.
    """
    at_once = min(max(_RANKED_BYTES // (8 * len(bank)), 1), QUERY_CHUNK_SIZE)
    blocks = (queries[i : i + at_once] for i in range(0, len(queries), at_once))
    more = f", {at_once:,} queries at a time" * (len(queries) > at_once)
    settings = dict(num_queries=len(queries), k=len(bank), at_once=at_once, is_shown=is_shown)
    for _, rows in _search(blocks, bank, say=lambda line: say(line + more), **settings):
        yield from rows


def _search(
    blocks: Iterable[Any], bank: Any, *, num_queries: int, k: int, at_once: int, say, is_shown
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What `nearest_neighbors` gives for each block of the queries."""
    mesh = make_mesh()
    settings = dict(mesh=mesh, query_chunk_size=at_once)
    plan = make_plan(num_queries, *bank.shape, k=min(k, len(bank)), **settings)
    secs = None
    if plan.num_steps * plan.chunks_per_device >= _TIMED_FROM:
        secs = plan.num_steps * seconds_per_step(plan, mesh=mesh)
    say(describe(plan, secs))
    with Display(total=plan.num_steps, done=0, unit="search step", is_shown=is_shown) as display:
        done = 0

        def on_step(_: int) -> None:
            nonlocal done
            done += 1
            display.advance(done)
            if secs is not None:
                display.show(done, "")

        for block in blocks:
            yield nearest_neighbors(block, bank, k=k, on_step=on_step, **settings)


def describe(plan: Plan, secs: float | None) -> str:
    """One line: what is searched, in how many pieces, at what cost.

    Args:
      plan: of the search.
      secs: it is going to take; None: not worth saying.
    """
    devices = f"{plan.num_devices} device" + ("s" if plan.num_devices > 1 else "")
    pieces = f"in {plan.num_pieces} pieces " if plan.num_pieces > 1 else ""
    return (
        f"search: the {plan.k} nearest of {plan.num_rows:,} rows for {plan.num_queries:,} queries, "
        f"width {plan.width:,}: {pieces}on {devices}, at most "
        f"{plan.device_bytes / 2**30:.2f} GiB on each"
        + ("" if secs is None else f", about {format_secs(secs)}")
    )
