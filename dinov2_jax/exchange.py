"""What only one host can know goes round once a step, so that all decide alike at the same step.

A bad image, a signal to stop, or how long it waited for data.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dinov2_jax.distributed import meet
from dinov2_jax.signals import StopSignals

_PER_SEC = 10**6  # whole numbers go round: microseconds


class Heard(NamedTuple):
    """What all processes have said of a step."""

    bad_record: np.ndarray  # int64 [any]
    wait_secs: float  # of the one that waited longest for data


# What was said in one step: of several processes still on its way.
Word = Heard | jax.Array


@dataclasses.dataclass
class Exchange:
    """Tells all processes, once a step, what each of them knows.

    Attributes:
      mesh: of the run; all processes have devices in it.
      signals: of this process.
    """

    mesh: Mesh
    signals: StopSignals

    def __post_init__(self):
        self._count, self._agreed = jax.process_count(), 0
        self._of_device = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
        self._gather = jax.jit(lambda x: x, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    @property
    def stop(self) -> int:
        """The number of the signal that all processes act on from now on; 0: none."""
        return self._agreed if self._count > 1 else self.signals.received or 0

    def say(self, bad_record: np.ndarray, *, wait_secs: float) -> Word:
        """Sends this process's word on a step; returns at once.

        Args:
          bad_record: int64 `[rows]` of this process's images, see `Batch`; as many on each.
          wait_secs: that its devices waited for data.
        """
        if self._count == 1:
            return Heard(bad_record, wait_secs)
        # Two int32 a number: the devices have no int64. Each device of a process says the same.
        rest = self.signals.received or 0, round(wait_secs * _PER_SEC)
        own = np.append(bad_record.astype(np.int64), rest).view(np.int32)
        shape = (self.mesh.size, len(own))
        said = jax.make_array_from_callback(shape, self._of_device, lambda _: own[None])
        return self._gather(said)

    def hear(self, word: Word) -> Heard:
        """Waits for what all have said of a step.

        Every process hears the words in the same order, and knows of a signal to any of them from
        the same word on.
        """
        if self._count == 1:
            return word
        said = np.ascontiguousarray(word).view(np.int64)  # [devices, rows + 2]
        self._agreed = max(self._agreed, int(said[:, -2].max()))
        return Heard(said[:, :-2].ravel(), said[:, -1].max() / _PER_SEC)


def of_primary(values: Mapping[str, float]) -> dict[str, float]:
    """Numbers as process 0 has them, for all to decide by; every process calls it.

    Each computes some by itself, such as the neighbours of an evaluation, and devices of the same
    kind need not round alike: a compiler may choose another product on each.

    Args:
      values: this process's; of the same names on all.
    """
    if jax.process_count() == 1:
        return dict(values)
    meet()
    own = np.array(list(values.values()), np.float64).view(np.int32)  # devices have no float64
    bits = np.asarray(multihost_utils.broadcast_one_to_all(own))
    return dict(zip(values, bits.view(np.float64).tolist(), strict=True))
