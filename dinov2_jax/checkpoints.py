"""Checkpoints: the train state and the host's books, saved in the background, kept by policy.

A thin wrapper on Orbax's `CheckpointManager`. One step is one directory that appears by a rename,
in an object store by a last object: a run killed while saving leaves the step before it untouched,
and a directory that was not completed is removed at the next start.
"""

import contextlib
import copy
import dataclasses
import errno
import logging
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dinov2_jax.distributed import HostError, LostHostError, check_same, on_primary, together
from dinov2_jax.faults import PassingFault, may_pass
from dinov2_jax.storage import is_url, move

STATE, HOST = "state", "host"
# Where a step that cannot be read is moved, out of the way of a new one of the same number. Beside
# the directory: in it, Orbax removes at gs:// all that it did not complete itself.
UNREADABLE = "_unreadable"


class _Unreadable(ValueError):
    """A step that is damaged, or of another tree."""


@dataclasses.dataclass
class KeepPolicy:
    """Which checkpoints stay: the last few, every so many steps, and the best one.

    Attributes:
      last: how many of the newest stay, at least 1.
      every_steps: multiples of it stay too; 0: none.
      best_step: stays too; None: none. The caller moves it as evaluations come in.
    """

    last: int
    every_steps: int = 0
    best_step: int | None = None

    def should_preserve(self, checkpoints: Sequence, *, context) -> list[bool]:
        """Orbax's question, for checkpoints in ascending order of their steps."""
        del context
        newest = {info.step for info in checkpoints[-self.last :]}
        return [
            info.step in newest
            or info.step == self.best_step
            or bool(self.every_steps and info.step % self.every_steps == 0)
            for info in checkpoints
        ]


@dataclasses.dataclass
class _Write:
    """One of a save's writes on its way, Orbax's `Future`, whose error is told before it is raised.

    Of several processes, the one whose write fails waits with its error for the others, and they
    for its write, ten minutes and more.
    """

    write: Any
    tell: Callable[[Exception], None]

    def result(self, timeout: float | None = None) -> Any:
        """Waits for the write."""
        try:
            return self.write.result(timeout=timeout)
        except Exception as error:
            self.tell(error)
            raise


def _telling(handler: Any, tell: Callable[[Exception], None]) -> Any:
    """A handler of Orbax whose writes tell their errors. Orbax knows it by its class: no other."""
    async_save = handler.async_save

    async def telling_save(*args, **kwargs) -> list[_Write]:
        return [_Write(write, tell) for write in await async_save(*args, **kwargs) or ()]

    handler.async_save = telling_save
    return handler


class Checkpoints:
    """Saves and restores under one directory. A context manager: leaving it waits for saves."""

    def __init__(
        self,
        directory: epath.PathLike,
        keep: KeepPolicy,
        *,
        on_failure: Callable[[Exception], None] = lambda error: None,
    ):
        """Opens the directory, creating it, and removes what a killed save left behind.

        Args:
          directory: on a disk, at gs://, or at s3:// after `object_stores.prepare`.
          keep: which steps stay; asked after every save.
          on_failure: called at once, in another thread, with what a write in the background fails
            of on this process; `save` and `wait` raise it when all processes know of it.

        Raises:
          LostHostError: the processes do not find the same steps there.
        """
        # Orbax logs every phase of every save, and each error once more with its traceback; all
        # errors are raised by `save`, `wait` or leaving the context.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.directory = epath.Path(directory)
        if not is_url(directory):  # Orbax saves to absolute paths only
            self.directory = self.directory.resolve()
        self.keep = keep
        self._on_failure = on_failure
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self.keep,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        manager = ocp.CheckpointManager(
            self.directory,
            options=options,
            item_handlers={
                STATE: _telling(ocp.StandardCheckpointHandler(), self._on_failure),
                HOST: _telling(ocp.JsonCheckpointHandler(), self._on_failure),
            },
        )
        try:
            check_same("list of checkpoints", f"{sorted(manager.all_steps())}")
        except HostError as error:  # a shared disk may show a host what was there a moment ago
            raise LostHostError(
                f"not all hosts see the same checkpoints in {self.directory}; if that is one "
                "folder for all, this passes: run the same command again"
            ) from error
        return manager

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def save(self, step: int, state: Any, host: dict[str, Any]) -> None:
        """Starts to save; returns when `state` is copied, so it may be donated or changed.

        A step that is already there is left as it is. An error of the save before this one, a
        full disk for example, is raised here or by `wait`.

        Args:
          step: updates done.
          state: a pytree of arrays.
          host: what JSON can hold.

        Raises:
          OSError: there is less space than the state takes (ENOSPC).
        """
        if step in self._manager.all_steps():
            return
        self._check_space(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    STATE: ocp.args.StandardSave(state),
                    HOST: ocp.args.JsonSave(copy.deepcopy(host)),
                }
            ),
            force=True,
        )

    def _check_space(self, num_bytes: int) -> None:
        """Fails before anything is half written: the writers' threads would fail one by one."""
        if is_url(self.directory):
            return
        free = shutil.disk_usage(self.directory).free
        if free < num_bytes:
            raise OSError(
                errno.ENOSPC, f"No space left: {free:,} bytes for a checkpoint of {num_bytes:,}"
            )

    def wait(self) -> None:
        """Returns when everything that was saved is on disk; raises what went wrong."""
        self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """The complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def restore_latest(
        self, abstract_state: Any, *, warn: Callable[[str], None]
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Restores the newest checkpoint that can be read.

        Steps that cannot be read (a disk error, a directory half deleted) are moved to
        `checkpoints_unreadable/`, so that nothing is lost and their numbers are free again. Of
        several processes, all restore the same step.

        Args:
          abstract_state: `jax.ShapeDtypeStruct`s, each with the sharding to restore onto.
          warn: told about every step that cannot be read, on each process what it knows.

        Returns:
          (step, state, host), or None if there is no checkpoint.

        Raises:
          ValueError: there are checkpoints and none can be read, or the newest holds another
            tree than `abstract_state` (another model, or another version).
          PassingFault: a step may be whole but cannot be read now: no answer, too little memory;
            `LostHostError` where that happened on another process.
        """
        failures = []
        wanted = ocp.args.Composite(
            **{
                STATE: ocp.args.StandardRestore(abstract_state),
                HOST: ocp.args.JsonRestore(),
            }
        )
        for step in reversed(self.steps()):
            try:
                # A step that one process cannot read is no step for any of them.
                restored = together(lambda step=step: self._read(step, wanted))
            except LostHostError as error:
                raise LostHostError(f"checkpoint {step}: {error}") from error
            except (_Unreadable, HostError) as error:
                failures.append((step, str(error)))
                warn(f"checkpoint {step} cannot be read ({error})")
                continue
            self._set_aside([failed for failed, _ in failures])
            return step, restored[STATE], restored[HOST]
        if failures:
            raise ValueError(
                f"none of the checkpoints {[step for step, _ in failures]} in {self.directory} "
                f"can be restored; start in another workdir, or with the code and configuration "
                f"that wrote them. The newest says: {failures[0][1]}"
            )
        return None

    def _read(self, step: int, wanted: ocp.args.Composite) -> Any:
        """Reads a step, or this process's part of it.

        Raises:
          PassingFault: by what may pass.
          _Unreadable: by anything else.
        """
        own = jax.process_index()
        handlers = {STATE: ocp.StandardCheckpointHandler(), HOST: ocp.JsonCheckpointHandler()}
        # For itself: at the end of a restore of all Orbax waits for them, those who failed too.
        alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
        try:
            with ocp.Checkpointer(
                ocp.CompositeCheckpointHandler(**handlers), multiprocessing_options=alone
            ) as reader:
                return reader.restore(self.directory / str(step), args=wanted)
        # Orbax and TensorStore raise many kinds; the newest step that loads is what counts.
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            if may_pass(error):
                raise PassingFault(
                    f"checkpoint {step} in {self.directory} cannot be read now ({reason}); run "
                    "the same command again, or, if it stays so, move that folder to "
                    f"{self.directory}{UNREADABLE} to go on from the step before"
                ) from error
            raise _Unreadable(reason) from error

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        self._manager.close()
        on_primary(lambda: self._move_aside(steps))
        self._manager = self._open()

    def _move_aside(self, steps: list[int]) -> None:
        folder = self.directory.with_name(self.directory.name + UNREADABLE)
        for step in steps:
            target = folder / str(step)
            with contextlib.suppress(FileNotFoundError):
                target.rmtree()
            move(self.directory / str(step), target)


def abstract_like(tree: Any, shardings: Any) -> Any:
    """`ShapeDtypeStruct`s of a tree's leaves with their shardings, for `restore_latest`."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )
