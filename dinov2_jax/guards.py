"""Guards on the host: has the run collapsed, which steps were not finite, and on what batch.

Pure functions of a JSON state and of the numbers that were logged. The state lies in the
checkpoint, so that a resumed run warns where the uninterrupted one does.
"""

import json
import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from etils import epath

# Cross-entropy within this share of ln K counts as "at ln K", and below it as "at 0". Collapsed
# runs in public reports agree with ln K to four digits (8.3178 = ln 4096, 11.0903 = ln 65536); one
# whose center stood still was at 0.0004 ln K after 60 steps. Runs that learn are at 0.2 to 1.
AT_LOG_K = 0.005
# Log lines that must agree before anything is said, and whose median is a start.
WINDOW = 5
# A signal has fallen when it is below this share of its start.
FALLEN = {"feature_std": 0.25, "feature_rank": 0.25, "knn": 0.5}
SIGNALS = ("feature_std", "feature_rank")
NONFINITE_FOLDER = "nonfinite"
LOSS_TERMS = ("dino_global_loss", "dino_local_loss", "ibot_loss", "koleo_loss")

LIKELY_CAUSES = (
    "learning rate too high or warm-up too short; teacher temperature too high; too few images a "
    "step for Sinkhorn-Knopp and this many prototypes; prototypes frozen for too long"
)


ONE_PROTOTYPE = (
    "the cross-entropy sits at 0: all images choose the same prototype; likely causes: softmax "
    "centering whose center does not move (centering.center_momentum) or whose teacher temperature "
    "is too low; centering.kind=sinkhorn_knopp does not collapse so"
)


class StopRun(RuntimeError):
    """A run that must not go on; its text is one line for the user."""


def new_collapse_state() -> dict[str, Any]:
    """The state before the first line."""
    return {
        "window": [],
        "lines_after_warmup": 0,
        "start": {},
        "knn_start": None,
        "knn_last": None,
        "warned": False,
    }


def forget_knn(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state as if no evaluation had been seen: those to come measure something else."""
    return {**state, "knn_start": None, "knn_last": None}


def watch_collapse(
    state: Mapping[str, Any], *, step: int, metrics: Mapping[str, float], warmup_steps: int
) -> tuple[dict[str, Any], str | None]:
    """Takes in one line and says whether the run has collapsed.

    A run has collapsed when, in each of the last `WINDOW` log lines, the mean cross-entropy of
    every loss in use sits at 0; or, after the warm-up,

        it sits at ln K, and
        feature_std, feature_rank or the kNN has fallen far below its start,

    where the start is the median of the first `WINDOW` lines of the run or after the warm-up,
    whichever is larger, and for the kNN its first value after the warm-up. Sitting at ln K means
    nothing by itself: with LayerScale 1e-5 a healthy small run does so for hundreds of steps,
    while its features spread and its kNN rises.

    Args:
      state: of `new_collapse_state`, or returned for the line before.
      step: updates done.
      metrics: a log line (feature_std, feature_rank, dino_ce_over_log_k or ibot_ce_over_log_k),
        or {"knn": value} for an evaluation of the teacher.
      warmup_steps: of the learning rate.

    Returns:
      The new state, JSON, and a one-line warning or None. It warns once per collapse.
    """
    state = json.loads(json.dumps(state))
    if "knn" in metrics:
        if step >= warmup_steps and state["knn_start"] is None:
            state["knn_start"] = metrics["knn"]
        state["knn_last"] = metrics["knn"]
        return state, None
    names = [name for name in ("dino_ce_over_log_k", "ibot_ce_over_log_k") if name in metrics]
    if not names or not all(math.isfinite(metrics[name]) for name in (*names, *SIGNALS)):
        return state, None
    line = {name: metrics[name] for name in SIGNALS}
    line["is_at_log_k"] = all(abs(metrics[name] - 1) < AT_LOG_K for name in names)
    line["is_at_zero"] = all(metrics[name] < AT_LOG_K for name in names)
    state["window"] = [*state["window"], line][-WINDOW:]
    state["lines_after_warmup"] += step > warmup_steps
    now = {name: median(line[name] for line in state["window"]) for name in SIGNALS}
    if len(state["window"]) < WINDOW:
        return state, None
    # Lines of an older checkpoint do not say so.
    if all(line.get("is_at_zero") for line in state["window"]):
        is_news, state["warned"] = not state["warned"], True
        return state, f"collapse at step {step}: {ONE_PROTOTYPE}" if is_news else None
    is_start = state["lines_after_warmup"] == WINDOW
    if is_start or not state["start"]:
        state["start"] = {name: max(now[name], state["start"].get(name, 0.0)) for name in SIGNALS}
    if state["lines_after_warmup"] <= WINDOW:
        return state, None
    fallen = _fallen(state, now)
    has_collapsed = bool(fallen) and all(line["is_at_log_k"] for line in state["window"])
    is_news = has_collapsed and not state["warned"]
    # It ends when the features are back: a line off ln K is no recovery.
    state["warned"] = has_collapsed or (state["warned"] and bool(fallen))
    if not is_news:
        return state, None
    return state, (
        f"collapse at step {step}: the cross-entropy sits at ln K and {', '.join(fallen)}; "
        f"likely causes: {LIKELY_CAUSES}"
    )


def _fallen(state: Mapping[str, Any], now: Mapping[str, float]) -> list[str]:
    """What has fallen, in words."""
    start, last = state["knn_start"], state["knn_last"]
    if start is not None and last < FALLEN["knn"] * start:
        return [f"the kNN has fallen from {start:.1%} to {last:.1%}"]
    return [
        f"{name} has fallen from {state['start'][name]:.3g} to {now[name]:.3g}"
        for name in SIGNALS
        if now[name] < FALLEN[name] * state["start"][name]
    ]


def nonfinite_terms(metrics: Mapping[str, float]) -> list[str]:
    """What of a step is nan or infinite: loss terms; else modules' gradients; else the update."""
    terms = [name for name in LOSS_TERMS if not math.isfinite(metrics.get(name, 0.0))]
    gradients = [
        f"the gradient of {name.removeprefix('grad_norm/')}"
        for name, value in metrics.items()
        if name.startswith("grad_norm/") and not math.isfinite(value)
    ]
    return terms or gradients or ["the update"]


def nonfinite_file(workdir: epath.PathLike, step: int) -> epath.Path:
    """Where a skipped step is written down; `step` updates were done, it included."""
    return epath.Path(workdir) / NONFINITE_FOLDER / f"step_{step}.json"


def save_nonfinite(path: epath.Path, *, step: int, terms: Sequence[str], index: np.ndarray) -> None:
    """Writes a file from which the batch of a skipped step can be made again.

    Args:
      path: of `nonfinite_file`.
      step: updates done, the skipped one included: the batch is that of 0-based step `step - 1`.
      terms: of `nonfinite_terms`.
      index: int64 [b], the batch's positions in the global order.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"step": step, "terms": list(terms), "index": [int(i) for i in index]}
    path.write_text(json.dumps(content) + "\n")


def check_nonfinite(count: int, *, limit: int, last: str) -> None:
    """Raises `StopRun` if more than `limit` steps were not finite; `last` tells of the last."""
    if count > limit:
        raise StopRun(
            f"{count} steps were not finite, more than guards.max_nonfinite_steps={limit}; the "
            f"last: {last}. Lower optim.base_learning_rate or raise optim.warmup_steps, or look "
            "at that batch"
        )
