"""What fits a run of a given size: the numbers behind every proposal and warning.

Each is a straight line in logarithms between a small run, measured (docs/learning.md and
configs/quickstart.py), and the paper's (appendix B, Tables 16-17; 3072 images a step, 625,000
steps, ViT-L). Beyond either, the nearer one's value holds.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Line:
    """A power law between two runs, constant beyond them.

    Attributes:
      small, large: (size, value) of the small and of the large run, all above 0.
    """

    small: tuple[float, float]
    large: tuple[float, float]

    def at(self, size: float) -> float:
        """The value for a size above 0."""
        sizes, values = np.log([self.small, self.large]).T
        return float(np.exp(np.interp(math.log(size), sizes, values)))


# K by the rows that meet it in a step. Small: configs/small.py; 1,024 was behind, 64 no better.
# Large: the paper. In between, 2048 images have 68,000: the reference's short recipe has 65,536.
PROTOTYPES = {
    "CLS tokens": Line(small=(128, 256), large=(6_144, 131_072)),
    "masked patches": Line(small=(614, 256), large=(235_930, 131_072)),
}
# 1 - momentum by steps. Small: between configs/small.py (0.04) and quickstart (0.02). Large: the
# paper. In between, 125,000 steps have 0.0097: the reference's short recipe has 0.008.
MOMENTUM_GAP = Line(small=(1_600, 0.035), large=(625_000, 0.006))
# The same at the end of a run. Small: configs/small.py, which goes on learning to its end.
# Large: the reference's short recipe and the paper end at 0.
MOMENTUM_END_GAP = Line(small=(3_000, 0.02), large=(125_000, 4e-5))
# Least (1 - momentum) * steps: half of it is the exponent by which a cosine to 1 forgets, and e^-3
# leaves 5 % of the initialisation. It decides below 300 steps.
FORGETTING = 6.0
# Base by steps, for batch 1024 and width 1024. Small: measured, 1e-3 at batch 64 and width 160.
# Large: the paper.
LEARNING_RATE = Line(small=(6_000, 1.6e-3), large=(625_000, 2e-4))
# Of the peak, at the end of a run, by steps. Small: configs/small.py, as above. Large: the paper.
LEARNING_RATE_END = Line(small=(3_000, 1.0), large=(125_000, 2.9e-3))
# Peaks that a proposal does not leave and a warning begins at: a factor of 2 and more around the
# reference's recipes (3.5e-4 to 5.7e-3), and room below for batches of a few images.
LEARNING_RATES = (1e-5, 1e-2)
# Warm-up, as a share of the steps. Small: judgement (configs/small.py has half). Large: the paper.
WARMUP_SHARE = Line(small=(6_000, 0.10), large=(625_000, 0.16))
# By centering and by steps; the second at the start. Small: measured; with Sinkhorn 0.04 took twice
# as many images, with softmax centering 0.02 left a few prototypes that take all images. Large: the
# reference's short recipe, which has the paper's values.
TEACHER_TEMP = {
    "sinkhorn_knopp": Line(small=(1_600, 0.02), large=(125_000, 0.07)),
    "softmax_center": Line(small=(1_600, 0.04), large=(125_000, 0.07)),
}
TEACHER_TEMP_START = {
    "sinkhorn_knopp": Line(small=(1_600, 0.02), large=(125_000, 0.04)),
    "softmax_center": Line(small=(1_600, 0.04), large=(125_000, 0.04)),
}
LAYER_SCALE = Line(small=(6_000, 0.1), large=(125_000, 1e-5))
# Weight of KoLeo, at any size: the paper's. On small data 0 and 0.5 were far behind.
KOLEO_WEIGHT = 0.1
# Images a group by images a batch. Small: judgement, the whole batch. Large: the paper's ViT-L.
GROUP_SIZE = Line(small=(64, 64), large=(3_072, 32))
_MOST_POINTS = 100_000


def fitting_momentum(total_steps: int) -> float:
    """The teacher's momentum at the start of a run, at least 0.5."""
    gap = max(MOMENTUM_GAP.at(total_steps), min(FORGETTING / total_steps, 0.5))
    return round(1 - float(f"{gap:.2g}"), 6)


def fitting_learning_rate(*, global_batch_size: int, embed_dim: int, total_steps: int) -> float:
    """The peak, after any rule: it grows with the root of the batch (the reference's rule), and
    falls with the root of the width.
    """
    base = LEARNING_RATE.at(total_steps)
    peak = base * math.sqrt(global_batch_size / 1024) * math.sqrt(1024 / embed_dim)
    return min(max(peak, LEARNING_RATES[0]), LEARNING_RATES[1])


def initialisation_left(momentum_start: float, momentum_end: float, *, total_steps: int) -> float:
    """The weight of the initialisation in the last teacher, with 0 for less than 1e-9.

        weight = 1
        for step in range(total_steps): weight *= momentum(step)

    with the momentum on half a cosine from start to end, as `Schedules` has it. Exact up to 100,000
    steps. A longer run is cut into 100,000 equal pieces, and the logarithm of each is taken as that
    of the momentum at its middle: to 1e-8 of a weight above 1e-9, at a cost that does not grow.
    """
    points = min(total_steps, _MOST_POINTS)
    steps_each = total_steps / points
    # The middles of the pieces, each step being at the middle of its own: 0, 1, .. if that is one.
    steps = (np.arange(points) + 0.5) * steps_each - 0.5
    cosine = np.cos(np.pi * steps / total_steps)
    momentum = momentum_end + 0.5 * (momentum_start - momentum_end) * (1 + cosine)
    with np.errstate(divide="ignore"):  # a momentum of 0 forgets all: log 0 is -inf, the weight 0
        weight = float(np.exp(steps_each * np.log(momentum).sum()))
    return weight if weight >= 1e-9 else 0.0
