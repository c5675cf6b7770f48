"""How the time of a step grows with batch, local crops, prototypes and depth; lines and a plot.

The quickstart's step, one of its sizes changed at a time, all values of a size in turns. What is
measured is added to a file, size by size: stop it at any time, the same command goes on.

    python -m benchmarks.growth measure FILE --threads 1
    python -m benchmarks.growth plot FILE --picture docs/images/growth.png
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import tempfile

import numpy as np

from benchmarks.contenders import start_ours
from benchmarks.turns import limit_threads, take_turns, timed
from dinov2_jax.arguments import positive

CONFIG = "quickstart"


@dataclasses.dataclass(frozen=True)
class Axis:
    """A size: its keys, the values they take, and its name in the plot."""

    keys: tuple[str, ...]
    values: tuple[int, ...]
    label: str


AXES = {
    "batch": Axis(("global_batch_size", "group_size"), (1, 4, 8, 16, 32), "images a step"),
    "crops": Axis(("crops.num_local_crops",), (0, 4, 8, 16), "local crops an image"),
    "prototypes": Axis(
        ("dino.num_prototypes", "ibot.num_prototypes"),
        (256, 8192, 16_384, 32_768),
        "prototypes of each head",
    ),
    "depth": Axis(("model.depth",), (2, 6, 12, 24), "blocks"),
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
        message = f"error: plot needs {error.name}; pip install -e '.[benchmarks]'"
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


def add(path: str, name: str, line: Line) -> None:
    """Writes what was measured of an axis to the end of a file."""
    row = {"axis": name, "values": line.values.tolist(), "seconds": line.seconds.tolist()}
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def read(path: str) -> dict[str, Line]:
    """The lines of a file of measurements; of an axis that is there twice, the last."""
    found = {}
    for number, text in enumerate(pathlib.Path(path).read_text().splitlines(), 1):
        try:
            row = json.loads(text)
            found[row["axis"]] = fit(row["values"], row["seconds"])
        except (ValueError, TypeError, KeyError) as error:
            message = f"error: {path}, line {number} is no measurement; remove it"
            raise SystemExit(message) from error
    return {name: found[name] for name in AXES if name in found}


def describe(name: str, line: Line) -> str:
    """ "depth: 5.0 ms + 91.2 ms each, within 2.0% of the largest"."""
    return (
        f"{name}: {1e3 * line.start:.1f} ms + {1e3 * line.slope:.4g} ms each, "
        f"within {line.largest_miss:.1%} of the largest"
    )


def check(options: argparse.Namespace) -> None:
    """Finds out before minutes of measuring what would fail after them."""
    is_plot = options.what == "plot"
    if is_plot and not pathlib.Path(options.file).is_file():
        raise SystemExit(f"error: there is no file {options.file}; make it by measure")
    target = pathlib.Path(options.picture if is_plot else options.file)
    if not target.parent.is_dir():
        raise SystemExit(f"error: {target}: there is no folder {target.parent}; create it")
    if target.is_dir():
        raise SystemExit(f"error: {target} is a folder; name a file in it")
    if is_plot and target.suffix not in (".png", ".svg"):
        raise SystemExit(f"error: --picture={target} must end in .png or .svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=("measure", "plot"))
    parser.add_argument("file", help="of measurements, one line an axis")
    parser.add_argument(
        "--axes", nargs="+", choices=AXES, help="to measure; default: those not in the file yet"
    )
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--picture", default="growth.png", help="of plot; .png or .svg")
    options = parser.parse_args()
    check(options)
    lines = read(options.file) if pathlib.Path(options.file).exists() else {}
    for name, line in lines.items():
        print(describe(name, line))
    if options.what == "measure":
        limit_threads(options.threads)
        os.environ["JAX_PLATFORMS"] = "cpu"
        for name in options.axes or [name for name in AXES if name not in lines]:
            line = measure(AXES[name], options.rounds)
            add(options.file, name, line)
            print(describe(name, line), flush=True)
    elif lines:
        plot(lines, options.picture)
    else:
        raise SystemExit(f"error: {options.file} is empty; fill it by measure")


if __name__ == "__main__":
    main()
