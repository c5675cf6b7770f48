"""Evaluates frozen features: `python -m dinov2_jax.evals TASK --model M --data D --out O`.

The same command again goes on where it was interrupted, and shows what is done. Exit codes: 0
done, 1 the disk is full, 2 wrong input, 130 interrupted (Ctrl-C).
"""

import difflib
import importlib
import sys
from collections.abc import Sequence

from dinov2_jax.commands import WRONG_INPUT, run_command
from dinov2_jax.evals.command import make_parser, run_task
from dinov2_jax.evals.suite import run_suite
from dinov2_jax.evals.task import Task
from dinov2_jax.evals.tasks import TASKS

SUITE = "suite"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; what is wrong is one line on stderr. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return run_command(lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == SUITE:
        failures = run_suite(argv[1:], find_task=find_task)
        for failure in failures:
            print(f"error: {failure}", file=sys.stderr)
        return WRONG_INPUT if failures else 0
    run_task(make_parser(find_task(argv[0])).parse_args(argv[1:]))
    return 0


def find_task(name: str) -> Task:
    """A task by name.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in TASKS:
        nearest = difflib.get_close_matches(name, [*TASKS, SUITE], n=1)
        cure = f"did you mean {nearest[0]}?" if nearest else "--help says what each does"
        raise ValueError(f"{name!r} must be one of {', '.join(TASKS)}, {SUITE}; {cure}")
    return importlib.import_module(f"dinov2_jax.evals.tasks.{name}").TASK


def _overview() -> str:
    lines = [f"  {name:13}{summary}" for name, summary in TASKS.items()]
    return "\n".join(
        [
            "usage: python -m dinov2_jax.evals TASK --model M --data D --out O",
            "",
            *lines,
            f"  {SUITE:13}all of these, as a file says, into one table",
            "",
            "TASK --help shows what D must hold, and all flags.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
