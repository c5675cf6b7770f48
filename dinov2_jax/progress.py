"""Progress for people: a bar with the time left on a terminal, plain lines everywhere else."""

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Shown beside the bar and in lines, in this order; metrics.jsonl has them all.
SHOWN = {
    "total_loss": "loss",
    "dino_global_loss": "dino global",
    "dino_local_loss": "local",
    "ibot_loss": "ibot",
    "koleo_loss": "koleo",
    "dino_ce_over_log_k": "ce/lnK",
}
SECS_BETWEEN_LINES = 5.0


class Display:
    """Shows how far the run is. A context manager."""

    def __init__(self, *, total: int, done: int, unit: str = "step", is_shown: bool = True):
        """`done` of `total` units are done; a display that is not shown is silent."""
        self._total, self._unit, self._is_shown = total, unit, is_shown
        self._started = (time.monotonic(), done)
        self._last_line = -SECS_BETWEEN_LINES
        self._bar = None
        console = Console(file=sys.stdout)
        if console.is_terminal and is_shown:
            self._bar = Progress(
                TextColumn(unit),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=console,
            )
            self._task = self._bar.add_task(unit, total=total, completed=done, numbers="")

    def __enter__(self) -> "Display":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    def line(self, text: str) -> None:
        """Prints a line of its own, above the bar if there is one."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._is_shown:
            print(text, flush=True)

    def advance(self, done: int) -> None:
        """`done` units are done."""
        if self._bar:
            self._bar.update(self._task, completed=done)

    def show(self, done: int, numbers: str) -> None:
        """Shows numbers of now; plain lines come no faster than one can read."""
        if self._bar:
            self._bar.update(self._task, completed=done, numbers=numbers)
            return
        now = time.monotonic()
        is_soon = now - self._last_line < SECS_BETWEEN_LINES and done < self._total
        if is_soon or not self._is_shown:
            return
        self._last_line = now
        left = self._time_left(done, now)
        print(f"{self._unit} {done}/{self._total}  {numbers}  {left}", flush=True)

    def _time_left(self, done: int, now: float) -> str:
        since, first = self._started
        secs = (now - since) / max(done - first, 1) * (self._total - done)
        return f"{format_secs(secs)} left"


def format_step(values: Mapping[str, float]) -> str:
    """The numbers of a log line of training that a person follows."""
    numbers = [f"{label} {values[name]:.4g}" for name, label in SHOWN.items() if name in values]
    return "  ".join([*numbers, f"{values['images_per_sec']:.4g} images/s"])


def format_secs(secs: float) -> str:
    """ "45s", "3m20s", "5h02m", "3d04h"."""
    minutes, secs = divmod(round(secs), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"
