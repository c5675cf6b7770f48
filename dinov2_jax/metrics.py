"""What a run writes about itself: metrics.jsonl, TensorBoard events, optional wandb, its origins.

Numbers come in as they were computed for one step, never averaged over steps, so that a resumed
run writes the same lines. Only times and rates, which no one can repeat, differ.
"""

import importlib.metadata
import json
import math
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from dinov2_jax import goodput, speed
from dinov2_jax.config_rules import ConfigError
from dinov2_jax.storage import GrowingFile, is_url, upload, write_whole

METRICS_FILE = "metrics.jsonl"
# The fields that depend on the machine and the moment: all others repeat bit for bit.
TIMING_FIELDS = ("data_wait_share", "eval_secs", *speed.FIELDS, *goodput.FIELDS)
# Packages whose versions decide what a run computes.
PACKAGES = (
    "dinov2_jax jax jaxlib flax optax orbax-checkpoint grain ml-collections einops numpy pillow "
    "simplejpeg safetensors"
).split()


class MetricsWriter:
    """Appends one JSON object a line; on a disk at once, in an object store see `GrowingFile`."""

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        restored_step: int | None,
        evaluated_step: int | None = None,
        tensorboard: bool = False,
        wandb_project: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        """Opens the files of a new or a resumed run.

        Args:
          workdir: an existing directory.
          restored_step: updates done in the state that was restored; later lines, and one that a
            kill left half written, are dropped. None: a new run, every line is dropped.
          evaluated_step: of the last evaluation that the restored state knows; the lines of later
            ones, which will be repeated, are dropped too. None: all of them are known.
          tensorboard: also write TensorBoard events to workdir/tensorboard.
          wandb_project: also send to this Weights & Biases project; "": off.
          config: shown by wandb.

        Raises:
          ConfigError: wandb is wanted and not installed.
        """
        workdir = epath.Path(workdir)
        self.path = workdir / METRICS_FILE
        self._tensorboard = self._wandb = self._local_events = None
        if wandb_project:
            self._wandb = _start_wandb(workdir, wandb_project, config or {})
        kept = kept_lines(self.path, restored_step, evaluated_step)
        # Whole: a kill in between must not lose the old lines.
        write_whole(self.path, "".join(f"{line}\n" for line in kept))
        self._file = GrowingFile(self.path)
        if tensorboard:
            purge_step = 0 if restored_step is None else restored_step + 1
            self._events = workdir / "tensorboard"
            if is_url(workdir):  # its own writer for gs:// hangs the run when an upload fails
                self._local_events = tempfile.TemporaryDirectory(prefix="dinov2_jax_")
            folder = pathlib.Path(self._local_events.name if self._local_events else self._events)
            # The name holds seconds only: two quick starts must not share a file.
            suffix = f".from{restored_step or 0}"
            self._tensorboard = _EventFile(folder, purge_step=purge_step, suffix=suffix)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        if self._wandb:
            self._wandb.finish()
        self.flush()  # last of what can fail: an upload must not leave wandb's run open
        if self._tensorboard:
            self._tensorboard.close()
        if self._local_events:
            self._local_events.cleanup()

    def flush(self) -> None:
        """Returns when every line is where it belongs; before a checkpoint that relies on them."""
        self._file.flush()
        if self._tensorboard:
            self._tensorboard.flush()
        if self._local_events:
            upload(pathlib.Path(self._local_events.name), self._events)

    def lines(self) -> list[dict[str, Any]]:
        """All that has been written, in order."""
        return read_metrics(self.path)

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Writes one line. Numbers that JSON does not know (nan, inf) become null.

        Args:
          step: updates done.
          values: plain numbers by name.
        """
        values = {name: _plain(value) for name, value in values.items()}
        self._file.add(json.dumps({"step": step, **values}) + "\n")
        finite = {name: value for name, value in values.items() if value is not None}
        if self._tensorboard:
            self._tensorboard.add(step, finite)
        if self._wandb:
            self._wandb.log(finite, step=step)


class _EventFile:
    """TensorBoard events, in the file when `flush` returns.

    tensorboardX's SummaryWriter has a queue between, which its flush does not wait for.
    """

    SECS = 30.0  # a reader waits at most; on a disk the steps do not wait for every line

    def __init__(self, folder: pathlib.Path, *, purge_step: int, suffix: str):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._scalar = Event, scalar
        self._writer = EventsWriter(str(folder / "events"), suffix)
        start = SessionLog(status=SessionLog.START)  # hides what an earlier run wrote from here on
        self._writer.write_event(Event(wall_time=time.time(), step=purge_step, session_log=start))
        self.flush()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            event = self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value))
            self._writer.write_event(event)
        if time.monotonic() > self._next_flush:
            self.flush()

    def flush(self) -> None:
        self._writer.flush()
        self._next_flush = time.monotonic() + self.SECS

    def close(self) -> None:
        self._writer.close()


class NoWriter:
    """Stands for a `MetricsWriter` on the processes that do not write."""

    def __enter__(self) -> "NoWriter":
        return self

    def __exit__(self, *_) -> None:
        """Nothing is open."""

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def lines(self) -> list[dict[str, Any]]:
        """None are known."""
        return []


def kept_lines(
    path: epath.Path, restored_step: int | None, evaluated_step: int | None = None
) -> list[str]:
    """The complete lines of a metrics file up to a step; none if the step is None.

    Of evaluations (lines with `eval_secs`) those up to `evaluated_step` only, unless it is None.
    """
    if restored_step is None:
        return []
    kept = []
    for line, values in _complete_lines(path):
        step = values["step"]
        is_known = "eval_secs" not in values or evaluated_step is None or step <= evaluated_step
        if step <= restored_step and is_known:
            kept.append(line)
    return kept


def _complete_lines(path: epath.Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a file that a kill may have left in any state, as they are and as values."""
    if not path.exists():
        return []
    lines = []
    text = path.read_bytes().decode(errors="replace")
    for line in text.split("\n")[:-1]:  # after the last newline: half a line, or none
        try:
            values = json.loads(line)
            values["step"]
        except (ValueError, KeyError, TypeError):
            continue  # a line that a full disk cut short, before a later one
        lines.append((line, values))
    return lines


def lines_left(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """What the starts before this one have written, however they ended."""
    return [values for _, values in _complete_lines(epath.Path(workdir) / METRICS_FILE)]


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics file, in order."""
    return [json.loads(line) for line in epath.Path(path).read_text().splitlines()]


def _plain(value) -> float | int | None:
    value = value.item() if hasattr(value, "item") else value
    return value if value is None or math.isfinite(value) else None


def _start_wandb(workdir: epath.Path, project: str, config: Mapping[str, Any]):
    """A wandb run that a resumed run goes on with: its id lies in the workdir."""
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"wandb_project={project!r} needs wandb, which is not installed; "
            "pip install 'dinov2_jax[wandb]', or leave wandb_project empty"
        ) from error
    id_file = workdir / "wandb_id.txt"
    known = id_file.read_text().strip() if id_file.exists() else None
    run = wandb.init(project=project, id=known, resume="allow", config=dict(config))
    id_file.write_text(run.id)
    return run


def describe_environment(devices: Sequence[Any], *, repository: epath.PathLike) -> dict[str, Any]:
    """Where and how this start of the run happens, as JSON can hold it.

    Args:
      devices: of the mesh.
      repository: the source tree, whose git revision is recorded if it has one.
    """
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [sys.executable, *sys.orig_argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "devices": sorted({f"{device.platform}: {device.device_kind}" for device in devices}),
        "num_devices": len(devices),
        "packages": versions,
        "git": git_revision(repository),
    }


def git_revision(repository: epath.PathLike) -> dict[str, Any] | None:
    """{"revision": ..., "dirty": ...} of a git checkout, or None where there is none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(repository), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return {
            "revision": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None


def add_environment(workdir: epath.PathLike, environment: Mapping[str, Any]) -> None:
    """Adds a start to workdir/environment.json: one entry for each time the command was run."""
    path = epath.Path(workdir) / "environment.json"
    try:
        starts = json.loads(path.read_text())["starts"]
    except (OSError, ValueError, KeyError):
        starts = []
    write_whole(path, json.dumps({"starts": [*starts, environment]}, indent=2) + "\n")
