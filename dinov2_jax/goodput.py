"""Where the wall time of a run goes, over all its starts, and which share of it was training.

Every moment is of one kind. Sums are in every log line and in every checkpoint, so that a resumed
run knows what its earlier starts took, and how much of their training was lost.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from dinov2_jax.progress import format_secs

STEP, LOST = "step", "lost"
# In the order of a run's life. "checkpoint": what saving kept the loop from doing, the teacher's
# file included; "evaluate": pictures too; LOST: steps that a kill undid.
KINDS = ("init", "compile", STEP, "data_wait", "checkpoint", "evaluate", LOST)
GOODPUT = "goodput"
FIELDS = (GOODPUT, *(f"secs/{kind}" for kind in KINDS))


class Goodput:
    """A stop watch with a counter for each kind; it begins with "init"."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        """Starts now; `clock` gives seconds."""
        self._clock = clock
        self._secs = dict.fromkeys(KINDS, 0.0)
        self._kind, self._since = KINDS[0], clock()

    def begin(self, kind: str) -> None:
        """From now on time is of this kind."""
        now = self._clock()
        self._secs[self._kind] += now - self._since
        self._kind, self._since = kind, now

    @contextlib.contextmanager
    def spent_on(self, kind: str) -> Iterator[None]:
        """Time in the context is of this kind, and then again of the kind before."""
        before = self._kind
        self.begin(kind)
        try:
            yield
        finally:
            self.begin(before)

    def move(self, secs: float, kind: str) -> None:
        """So much of the time that went to steps was of another kind."""
        self._secs[STEP] -= secs
        self._secs[kind] += secs

    def secs(self) -> dict[str, float]:
        """Seconds of each kind until now."""
        self.begin(self._kind)
        return dict(self._secs)

    def carry(self, saved: Mapping[str, float], lines: Sequence[Mapping]) -> None:
        """Adds what the earlier starts took.

        Args:
          saved: `secs` in the checkpoint that was restored; {}: none was.
          lines: of metrics.jsonl, in order, those that the restored run will repeat included. What
            came after the last of them, before a kill, is not known.
        """
        newest = next((line for line in reversed(lines) if GOODPUT in line), {})
        earlier = {kind: newest.get(f"secs/{kind}", 0.0) for kind in KINDS}
        if sum(saved.values()) >= sum(earlier.values()):
            earlier |= saved  # saved after the last line: nothing is lost
        lost = earlier[STEP] - saved.get(STEP, 0.0)
        earlier[STEP] -= lost
        earlier[LOST] += lost
        for kind, secs in earlier.items():
            self._secs[kind] += secs

    def fields(self) -> dict[str, float]:
        """`FIELDS` of a log line: seconds of each kind, and the share of all that went to steps."""
        secs = self.secs()
        share = secs[STEP] / max(sum(secs.values()), 1e-9)
        return {GOODPUT: share, **{f"secs/{kind}": value for kind, value in secs.items()}}

    def describe(self) -> str:
        """A line for people, the longest first."""
        secs = self.secs()
        order = sorted((kind for kind in KINDS if secs[kind] >= 0.5), key=secs.get, reverse=True)
        parts = ", ".join(f"{kind.replace('_', ' ')} {format_secs(secs[kind])}" for kind in order)
        total = sum(secs.values())
        return f"goodput {secs[STEP] / max(total, 1e-9):.0%} of {format_secs(total)}: {parts}"
