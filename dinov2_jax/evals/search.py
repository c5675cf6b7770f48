"""The search for neighbours as a task runs it: over all devices, planned aloud, with a bar."""

from collections.abc import Callable
from typing import Any

import numpy as np

from dinov2_jax.neighbors import nearest_neighbors, seconds_per_step
from dinov2_jax.neighbors_plan import Plan, make_plan
from dinov2_jax.progress import Display, format_secs
from dinov2_jax.sharding import make_mesh

# Below so many chunks of queries times chunks of bank on a device, timing one would take longer
# than it is worth.
_TIMED_FROM = 16


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
    mesh = make_mesh()
    plan = make_plan(len(queries), *bank.shape, k=min(k, len(bank)), mesh=mesh)
    secs = None
    if plan.num_steps * plan.chunks_per_device >= _TIMED_FROM:
        secs = plan.num_steps * seconds_per_step(plan, mesh=mesh)
    say(describe(plan, secs))
    with Display(total=plan.num_steps, done=0, unit="search step", is_shown=is_shown) as display:

        def on_step(number: int) -> None:
            display.advance(number)
            if secs is not None:
                display.show(number, "")

        return nearest_neighbors(queries, bank, k=k, mesh=mesh, on_step=on_step)


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
