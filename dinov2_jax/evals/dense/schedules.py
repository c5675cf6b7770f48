"""Schedules of head training, evaluated on the host in float64: learning rate and Adam's b1.

Behaviour follows mmcv's hooks as the reference's configurations set them (Apache-2.0): poly for
segmentation, cosine and one cycle of momentum for depth. Step 0 is the first update.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadSchedule:
    """Learning rate and b1 of every step.

        rate(step)   = peak * decay(step / total), decay(x) = 1 - x  or  (1 + cos(pi x)) / 2
        step < W:      rate * (1 - (1 - warmup_ratio) * (1 - step / W))

    Attributes:
      decay: "poly" (of power 1, to 0) or "cosine" (to `1e-8 * peak`).
      peak: learning rate.
      total_steps: of the training.
      warmup_steps: W, in which the rate also grows.
      warmup_ratio: share of the rate at step 0.
      b1: Adam's, where it does not move.
      b1_cycle: its (highest, lowest): from the first to the second in the first 30 % of the steps,
        and back, both along half a cosine; None: it does not move.
    """

    decay: str
    peak: float
    total_steps: int
    warmup_steps: int
    warmup_ratio: float
    b1: float = 0.9
    b1_cycle: tuple[float, float] | None = None

    def __post_init__(self):
        if self.decay not in ("poly", "cosine"):
            raise ValueError(f"decay={self.decay!r} must be poly or cosine; choose one")
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must lie between 0 and total_steps="
                f"{self.total_steps}; shorten the warm-up"
            )

    def learning_rate(self, step: int) -> float:
        """Of update number `step`."""
        if self.decay == "poly":
            rate = self.peak * (1 - step / self.total_steps)
        else:
            rate = _between(self.peak, 1e-8 * self.peak, step / self.total_steps)
        if step < self.warmup_steps:
            rate *= 1 - (1 - self.warmup_ratio) * (1 - step / self.warmup_steps)
        return rate

    def momentum(self, step: int) -> float:
        """b1 of update number `step`."""
        if self.b1_cycle is None:
            return self.b1
        high, low = self.b1_cycle
        turn, end = 0.3 * self.total_steps - 1, self.total_steps - 1
        if step <= turn:
            return _between(high, low, step / turn if turn else 1.0)
        return _between(low, high, (step - turn) / max(end - turn, 1))


def _between(start: float, end: float, share: float) -> float:
    """Along half a cosine."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * share))
