"""The loop: steps, and between them logs, evaluations, checkpoints and the teacher's file.

What the host knows beside the train state (its books) is saved in the same checkpoint, and is
brought up to a step before anything of that step is saved: a resumed run repeats every number.
"""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from dinov2_jax import guards
from dinov2_jax.checkpoints import Checkpoints
from dinov2_jax.distributed import is_primary
from dinov2_jax.exchange import Exchange, Word
from dinov2_jax.feed import Feed
from dinov2_jax.goodput import Goodput
from dinov2_jax.metrics import MetricsWriter
from dinov2_jax.optim.schedules import Hyperparameters, Schedules
from dinov2_jax.progress import Display, format_step
from dinov2_jax.rhythm import Rhythm
from dinov2_jax.speed import Speed
from dinov2_jax.storage import made_locally
from dinov2_jax.train_state import TrainState
from dinov2_jax.workdir import BadImages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """When the host warns about a run, or stops it.

    Attributes:
      max_nonfinite_steps: one more stops the run.
      check_collapse: whether to watch for a collapse.
      warmup_steps: of the learning rate; a collapse is looked for after it.
    """

    max_nonfinite_steps: int
    check_collapse: bool
    warmup_steps: int


def new_books() -> dict[str, Any]:
    """What the host knows before the first step; JSON can hold it."""
    return {
        "bad_records": [],
        "nonfinite_steps": 0,
        "collapse": guards.new_collapse_state(),
        "evaluated_step": -1,
        "evaluation": None,  # what the kNN in these books was measured on
        "secs": {},  # of the run so far, see `goodput`
        "best": None,  # or {"step": ..., "value": ...} of the best in-run kNN
    }


class _Dispatched(NamedTuple):
    """A step on its way, and what the hosts say of its batch."""

    step: int  # updates done after it
    metrics: Mapping[str, jax.Array]
    hyper: Hyperparameters
    word: Word


@dataclasses.dataclass(kw_only=True)
class Loop:
    """One run, from a step to the last or to a signal.

    Attributes:
      workdir: where everything lies.
      state, step, books: what is trained, updates done, and the host's books (`new_books`).
      train_step: (state, device batch, hyperparameters) -> (state, metrics); donates the state.
      schedules, feed: of the hyperparameters and of the batches.
      images_per_step: the global batch size.
      speed, goodput: how fast steps are; where the time goes.
      rhythm, limits: when things happen.
      checkpoints, writer, display, bad_images: where things go.
      evaluate: (teacher parameters, step) -> metrics by name; None: no evaluation.
      evaluation: what it measures, in JSON; numbers of two different ones are never compared.
      best_metric: the evaluation's number that is shown and watched.
      keep_best: whether the checkpoint with the highest one is kept.
      last_evaluation: the newest value of every evaluation metric, baselines included.
      write_teacher: (teacher parameters, step) -> None.
      exchange: with the other processes: bad images, waiting, and whether a signal came.
    """

    workdir: epath.Path
    state: TrainState
    step: int
    books: dict[str, Any]
    train_step: Callable
    schedules: Schedules
    feed: Feed
    images_per_step: int
    speed: Speed
    goodput: Goodput
    rhythm: Rhythm
    limits: Limits
    checkpoints: Checkpoints
    writer: MetricsWriter
    display: Display
    bad_images: BadImages
    evaluate: Callable[[Any, int], dict[str, float]] | None
    evaluation: str
    best_metric: str
    keep_best: bool
    write_teacher: Callable[[Any, int], None]
    exchange: Exchange
    last_evaluation: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self._pending: collections.deque[_Dispatched] = collections.deque()
        self.bad_images.records = set(self.books["bad_records"])
        if self.books["best"]:
            self.checkpoints.keep.best_step = self.books["best"]["step"]
        self._is_tracing, self._tracing = False, contextlib.ExitStack()
        self._restart_clock()

    def run(self) -> bool:
        """Trains; says whether the end was reached. The last checkpoint is left to `save`.

        That checkpoint tells that a run is finished, so it comes after all else that one leaves.
        """
        self.goodput.begin("step")
        self._restart_clock()
        while True:
            # What the last step owes is paid even if a signal came: its checkpoint says finished.
            if not self.exchange.stop or self.step == self.rhythm.total:
                self._between_steps()
            if self.step == self.rhythm.total:
                self._stop_trace()
                return True
            if self.exchange.stop:
                break
            self._one_step()
        self._settle(0)
        self._stop_trace()
        return False

    def save(self) -> None:
        """Starts to save a checkpoint of the steps done so far, all of which are in the books."""
        if self.step > 0:
            self.books["bad_records"] = sorted(self.bad_images.records)
            self.bad_images.flush()
            self.writer.flush()
            with self.goodput.spent_on("checkpoint"):
                self.books["secs"] = self.goodput.secs()
                self.checkpoints.save(self.step, self.state, self.books)

    def _one_step(self) -> None:
        """Dispatches a step, sends the next batch after it, then looks at the step before."""
        self._trace()
        fed = self.feed.take()
        hyper = self.schedules.at(self.step)
        with jax.profiler.StepTraceAnnotation("train", step_num=self.step):
            self.state, metrics = self.train_step(self.state, fed.device, hyper)
        self.step += 1
        waited = self.feed.wait_secs
        if self.step < self.rhythm.total:
            self.feed.peek(computing=metrics)
        word = self.exchange.say(fed.host.bad_record, wait_secs=self.feed.wait_secs - waited)
        self._pending.append(_Dispatched(self.step, metrics, hyper, word))
        # One step stays in flight, so that the device never waits for the books.
        self._settle(1)
        self.display.advance(self.step)

    def _trace(self) -> None:
        """Starts or stops the profiler where the rhythm says so."""
        first, last = self.rhythm.profile or (-1, -1)
        if self.step == first:
            self._settle(0)
            folder = self._tracing.enter_context(made_locally(self.workdir / "profile"))
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # the decoding threads' calls would drown the step
            options.session_id = f"steps_{first}_{last}"  # one folder for the files of all hosts
            self._tracing.enter_context(jax.profiler.trace(str(folder), profiler_options=options))
            self._is_tracing = True
        elif self.step >= last:
            self._stop_trace()

    def _stop_trace(self) -> None:
        if self._is_tracing:
            self._settle(0)
            self._tracing.close()
            self._is_tracing = False

    def _settle(self, in_flight: int) -> None:
        """Enters all but the newest steps into the books, in order."""
        while len(self._pending) > in_flight:
            step, metrics, hyper, word = self._pending.popleft()
            heard = self.exchange.hear(word)
            self.bad_images.add(heard.bad_record)
            self._waited += heard.wait_secs
            self.goodput.move(heard.wait_secs, "data_wait")
            if int(metrics["nonfinite"]):
                self._note_nonfinite(step, jax.device_get(metrics))
            self._settled += 1
            if step == 1 or self.rhythm.is_due("log", step):
                self._log(step, jax.device_get(metrics), hyper)

    def _log(self, step: int, metrics: Mapping, hyper: Hyperparameters) -> None:
        """Writes the line of one step."""
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        first = [name for name in ("total_loss", *guards.LOSS_TERMS) if name in metrics]
        names = dict.fromkeys([*first, *metrics])  # jit has sorted them
        values = {name: float(metrics[name]) for name in names if name != "nonfinite"}
        values |= {name: float(value) for name, value in hyper._asdict().items()}
        values["bad_images"] = self.bad_images.count
        values["nonfinite_steps"] = self.books["nonfinite_steps"]
        values["collapse_warning"] = self._watch_collapse(step, values)
        values |= self.speed.fields(elapsed / self._settled)
        values["data_wait_share"] = min(self._waited / elapsed, 1.0)
        values |= self.goodput.fields()
        self.writer.write(step, values)
        self.display.show(step, format_step(values))
        self._restart_clock()

    def _watch_collapse(self, step: int, values: Mapping[str, float]) -> int:
        if not self.limits.check_collapse:
            return 0
        self.books["collapse"], warning = guards.watch_collapse(
            self.books["collapse"],
            step=step,
            metrics=values,
            warmup_steps=self.limits.warmup_steps,
        )
        if warning:
            self.display.line(f"warning: {warning}")
        return int(warning is not None)

    def _note_nonfinite(self, step: int, metrics: Mapping) -> None:
        """Saves what a skipped step was made of; raises when there were too many."""
        terms = guards.nonfinite_terms(metrics)
        index = np.arange((step - 1) * self.images_per_step, step * self.images_per_step)
        path = guards.nonfinite_file(self.workdir, step)
        if is_primary():
            guards.save_nonfinite(path, step=step, terms=terms, index=index)
        self.books["nonfinite_steps"] += 1
        text = f"step {step} was not finite in {', '.join(terms)} and was skipped; batch in {path}"
        self.display.line(f"warning: {text}")
        guards.check_nonfinite(
            self.books["nonfinite_steps"], limit=self.limits.max_nonfinite_steps, last=text
        )

    def _between_steps(self) -> None:
        """What is due after `self.step` updates. Before the first step: an evaluation only."""
        step, rhythm = self.step, self.rhythm
        due = [name for name in ("evaluate", "teacher", "checkpoint") if rhythm.is_due(name, step)]
        if self.evaluate is None or self.books["evaluated_step"] == step:
            due = [name for name in due if name != "evaluate"]
        if not due:
            return
        self._settle(0)
        if self.exchange.stop and step < rhythm.total:
            return  # heard of only now; all of it is still owed after the resume
        # Saved first: a run that is killed in a long evaluation resumes here, and owes that alone.
        if "checkpoint" in due and step < rhythm.total:
            self.save()
        if "evaluate" in due:
            self._evaluate()
        if "teacher" in due:
            with self.goodput.spent_on("checkpoint"):
                self.write_teacher(self.state.teacher, self.step)
        self._restart_clock()

    def _evaluate(self) -> None:
        started = time.perf_counter()
        try:
            with self.goodput.spent_on("evaluate"):
                values = self.evaluate(self.state.teacher, self.step)
        except ValueError as error:  # no readable image, or features that are not finite
            raise guards.StopRun(
                f"the evaluation after step {self.step} failed: {error}"
            ) from error
        self.writer.write(self.step, {**values, "eval_secs": time.perf_counter() - started})
        self.books["evaluated_step"] = self.step
        if self.books["evaluation"] != self.evaluation:
            collapse = guards.forget_knn(self.books["collapse"])
            self.books |= {"evaluation": self.evaluation, "best": None, "collapse": collapse}
            self.last_evaluation = {}
        self.last_evaluation |= values
        value = values[self.best_metric]
        self._watch_collapse(self.step, {"knn": value})
        self.display.line(f"step {self.step}  {self.best_metric} {value:.1%}")
        best = self.books["best"]
        if self.keep_best and self.step > 0 and (best is None or value > best["value"]):
            self.books["best"] = {"step": self.step, "value": value}
            self.checkpoints.keep.best_step = self.step
            if self.step < self.rhythm.total:
                self.save()

    def _restart_clock(self) -> None:
        """Rates are measured from here: evaluations and saves do not count as training."""
        self._started, self._settled, self._waited = time.perf_counter(), 0, 0.0
