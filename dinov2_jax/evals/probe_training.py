"""Training of a linear probe's grid: batches to the devices, progress, and a file to go on from."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dinov2_jax import distributed
from dinov2_jax.convert.safetensors_file import read_safetensors, write_safetensors
from dinov2_jax.convert.state_dict import flatten, nest
from dinov2_jax.data.ahead import map_ahead
from dinov2_jax.evals.linear_probe import Columns, ProbeState, Variant, train_steps
from dinov2_jax.progress import Display
from dinov2_jax.sharding import BATCH_AXES, batch_shards, make_mesh

STATE_FILE = "linear_state.safetensors"
_BYTES_AT_ONCE = 64 * 2**20  # of features on their way to the devices
_MAX_STEPS_AT_ONCE = 50

Batches = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def train_probe(
    state: ProbeState,
    batches: Batches,
    *,
    rates: Sequence[float],
    variants: tuple[Variant, ...],
    columns: Columns,
    total_steps: int,
    batch_size: int,
    file: pathlib.Path,
    settings: Mapping[str, Any],
    save_every: int = 1250,
    anew: bool = False,
    is_primary: bool = True,
) -> ProbeState:
    """Trains all classifiers to the end of the schedule, from where an earlier call was.

    An interrupted training goes on bit for bit as if it had not been interrupted.

    Args:
      state: before the first step.
      batches: from positions `[steps, b]` to features and labels; see `probe_batches`.
      rates: learning rates.
      variants, columns: of the state and the features.
      total_steps: of the schedule.
      batch_size: over all devices.
      file: where the state is kept; what is complete stays there.
      settings: JSON; a file of other settings is not gone on with.
      save_every: steps between two saves, about.
      anew: a file of other settings, or a damaged one, is replaced.
      is_primary: whether this process writes and speaks.

    Raises:
      ValueError: the file is of other settings, or damaged.
    """
    # Together: one that came late would find what the primary had written meanwhile.
    saved = distributed.together(lambda: _load(file, settings, anew=anew))
    state = saved or state
    first = int(state.step)
    mesh = make_mesh()
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    axes = BATCH_AXES if batch_size % batch_shards(mesh) == 0 else None
    sharding = NamedSharding(mesh, PartitionSpec(None, axes))
    at_once = _BYTES_AT_ONCE // (4 * batch_size * columns.width)
    at_once = min(max(at_once, 1), _MAX_STEPS_AT_ONCE)
    # Chunks end at the same steps whatever happened before: a resumed run computes the same.
    save_every = -(-save_every // at_once) * at_once
    starts = range(first, total_steps, at_once)
    rates = np.asarray(rates, np.float32)

    def read(start: int) -> tuple[jax.Array, jax.Array]:
        count = min(at_once, total_steps - start)
        return _put(batches, start, (count, batch_size), sharding)

    with Display(total=total_steps, done=first, unit="iteration", is_shown=is_primary) as display:
        if first:
            display.line(f"{first:,} of {total_steps:,} iterations are done: going on")
        ahead = map_ahead(read, starts, num_threads=1, ahead=1)
        with contextlib.closing(ahead):
            for start, (features, labels) in zip(starts, ahead, strict=True):
                state, losses = train_steps(
                    state,
                    features,
                    labels,
                    rates,
                    variants=variants,
                    columns=columns,
                    total_steps=total_steps,
                )
                done = start + len(losses)
                if done % save_every == 0 or done == total_steps:
                    save_state(file, state, settings, is_primary=is_primary)
                lowest = float(np.nanmin(np.asarray(losses[-1])))
                display.show(done, f"lowest loss {lowest:.4g}")
    return state


def save_state(
    file: pathlib.Path, state: ProbeState, settings: Mapping[str, Any], *, is_primary: bool
) -> None:
    """Writes a state, whole or not at all, on the primary process."""

    def write() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        flat = flatten(jax.device_get({"params": state.params, "velocity": state.velocity}))
        facts = {"step": str(int(state.step)), "settings": json.dumps(settings, sort_keys=True)}
        write_safetensors(file, flat, facts)

    distributed.together(write if is_primary else lambda: None)


def _load(file: pathlib.Path, settings: Mapping[str, Any], *, anew: bool) -> ProbeState | None:
    if not file.exists():
        return None
    cure = "delete it, choose another --out, or --force to begin anew"
    try:
        flat, facts = read_safetensors(file)
        found, step = json.loads(facts["settings"]), int(facts["step"])
    except (ValueError, KeyError) as error:
        if anew:
            return None
        raise ValueError(f"{file} is damaged ({error}); {cure}") from error
    settings = json.loads(json.dumps(settings))
    if found != settings:
        if anew:
            return None
        different = [
            f"{name}: {found.get(name)!r} -> {settings.get(name)!r}"
            for name in sorted({*found, *settings})
            if found.get(name) != settings.get(name)
        ]
        raise ValueError(f"{file} was trained otherwise ({'; '.join(different)}); {cure}")
    tree = nest(flat)
    return ProbeState(tree["params"], tree["velocity"], np.int32(step))


def _put(
    batches: Batches, start: int, shape: tuple[int, int], sharding: NamedSharding
) -> tuple[jax.Array, jax.Array]:
    """Steps `start` and after as global arrays; this host reads the columns that it holds."""
    steps, batch_size = shape
    own = sharding.addressable_devices_indices_map(shape).values()
    ranges = sorted({index[1].indices(batch_size)[:2] for index in own})
    columns = np.concatenate([np.arange(*each) for each in ranges])
    positions = (start + np.arange(steps))[:, None] * batch_size + columns
    features, labels = batches(positions)

    def put(local: np.ndarray) -> jax.Array:
        def piece(index) -> np.ndarray:
            first, last, _ = index[1].indices(batch_size)
            return local[:, np.searchsorted(columns, first) : np.searchsorted(columns, last)]

        return jax.make_array_from_callback((*shape, *local.shape[2:]), sharding, piece)

    return put(features), put(labels)
