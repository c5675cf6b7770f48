"""When things happen in a run: pure arithmetic on the number of steps done."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rhythm:
    """How often things happen, in steps; 0: after the last step only.

    Attributes:
      total: steps of the run.
      log, checkpoint, evaluate, teacher: intervals.
      profile: steps done before the first and after the last traced step, or None.
    """

    total: int
    log: int
    checkpoint: int
    evaluate: int
    teacher: int
    profile: tuple[int, int] | None = None

    def misses_profile(self, step: int) -> bool:
        """Whether a run that begins after `step` updates is too late for the trace."""
        return self.profile is not None and step > self.profile[0]

    def is_due(self, name: str, step: int) -> bool:
        """Whether something happens after `step` updates.

        Everything does after the last, and before the first an evaluation, nothing else.
        """
        if step == 0:
            return name == "evaluate"
        interval = getattr(self, name)
        return step == self.total or bool(interval and step % interval == 0)
