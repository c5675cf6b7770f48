"""How the time of a step grows with batch, local crops, prototypes and depth; lines and a plot.

The quickstart's step, one of its sizes changed at a time, all values of a size in turns.

    python -m benchmarks.growth --threads 1 --plot docs/images/growth.png
"""

import argparse
import dataclasses
import functools
import os
import tempfile

import numpy as np

from benchmarks.contenders import start_ours
from benchmarks.turns import limit_threads, take_turns, timed

CONFIG = "quickstart"


@dataclasses.dataclass(frozen=True)
class Axis:
    """A size: its keys, the values they take, and its name in the plot."""

    keys: tuple[str, ...]
    values: tuple[int, ...]
    label: str


AXES = {
    "batch": Axis(("global_batch_size", "group_size"), (1, 2, 4, 8, 16, 24, 32), "images a step"),
    "crops": Axis(("crops.num_local_crops",), (0, 2, 4, 8, 12, 16), "local crops an image"),
    "prototypes": Axis(
        ("dino.num_prototypes", "ibot.num_prototypes"),
        (256, 2048, 4096, 8192, 16_384, 32_768),
        "prototypes of each head",
    ),
    "depth": Axis(("model.depth",), (2, 4, 6, 12, 18, 24), "blocks"),
}


@dataclasses.dataclass(frozen=True)
class Line:
    """Seconds by value, and the straight line through them."""

    values: np.ndarray
    seconds: np.ndarray
    slope: float
    start: float

    @property
    def largest_miss(self) -> float:
        """Of the line, as a share of the largest value measured."""
        miss = self.start + self.slope * self.values - self.seconds
        return float(np.abs(miss).max() / self.seconds.max())


def fit(values, seconds) -> Line:
    """Least squares."""
    slope, start = np.polyfit(values, seconds, 1)
    return Line(np.array(values), np.array(seconds), float(slope), float(start))


def measure(axis: Axis, num_rounds: int) -> Line:
    """Median CPU seconds of a step at every value."""
    contenders = {}
    for value in axis.values:
        with tempfile.TemporaryDirectory() as folder:
            step = start_ours(CONFIG, dict.fromkeys(axis.keys, value), folder)
        contenders[value] = functools.partial(timed, step)
    seconds = take_turns(contenders, num_rounds)
    return fit(axis.values, [np.median(seconds[value][:, 1]) for value in axis.values])


def plot(lines: dict[str, Line], path: str) -> None:
    """One panel an axis."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = f"error: --plot needs {error.name}; pip install -e '.[benchmarks]'"
        raise SystemExit(message) from error
    figure = Figure(figsize=(9, 2.4), dpi=80, layout="constrained")
    for name, ax in zip(lines, np.atleast_1d(figure.subplots(1, len(lines))), strict=True):
        line = lines[name]
        ax.plot(line.values, line.start + line.slope * line.values, color="0.7")
        ax.plot(line.values, line.seconds, ".", color="black")
        ax.set_xlabel(AXES[name].label)
        ax.set_ylim(0)
        ax.set_xlim(0)
    figure.supylabel("CPU seconds a step", fontsize="medium")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--plot", default="", metavar="FILE", help=".png or .svg")
    options = parser.parse_args()
    limit_threads(options.threads)
    os.environ["JAX_PLATFORMS"] = "cpu"
    lines = {}
    for name in options.axes:
        line = lines[name] = measure(AXES[name], options.rounds)
        points = ", ".join(f"{v}: {s:.3f}" for v, s in zip(line.values, line.seconds, strict=True))
        print(
            f"{name}: {1e3 * line.start:.1f} ms + {1e3 * line.slope:.4g} ms each, "
            f"within {line.largest_miss:.1%}; CPU s: {points}",
            flush=True,
        )
    if options.plot:
        plot(lines, options.plot)


if __name__ == "__main__":
    main()
