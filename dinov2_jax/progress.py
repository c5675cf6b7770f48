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

    def __init__(self, *, total_steps: int, step: int, is_shown: bool = True):
        """`step` of `total_steps` are done; a display that is not shown is silent."""
        self._total = total_steps
        self._started = (time.monotonic(), step)
        self._last_line = -SECS_BETWEEN_LINES
        self._bar = None
        console = Console(file=sys.stdout)
        self._is_shown = is_shown
        if console.is_terminal and is_shown:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=console,
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=step, numbers="")

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

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the numbers of a log line; plain lines come no faster than one can read."""
        numbers = "  ".join(
            f"{label} {values[name]:.4g}" for name, label in SHOWN.items() if name in values
        )
        numbers += f"  {values['images_per_sec']:.4g} images/s"
        if self._bar:
            self._bar.update(self._task, completed=step, numbers=numbers)
            return
        now = time.monotonic()
        is_soon = now - self._last_line < SECS_BETWEEN_LINES and step < self._total
        if is_soon or not self._is_shown:
            return
        self._last_line = now
        print(f"step {step}/{self._total}  {numbers}  {self._time_left(step, now)}", flush=True)

    def _time_left(self, step: int, now: float) -> str:
        since, first = self._started
        secs = (now - since) / max(step - first, 1) * (self._total - step)
        return f"{format_secs(secs)} left"


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
