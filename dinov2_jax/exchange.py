"""What only one host can know goes round once a step, so that all decide alike at the same step.

A bad image, or a signal to stop.
"""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dinov2_jax.signals import StopSignals

# What was said in one step: of several processes still on its way.
Word = np.ndarray | jax.Array


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

    def say(self, bad_record: np.ndarray) -> Word:
        """Sends this process's word on a step; returns at once.

        Args:
          bad_record: int64 `[rows]` of this process's images, see `Batch`; as many on each.
        """
        if self._count == 1:
            return bad_record
        # Two int32 a number: the devices have no int64. Each device of a process says the same.
        own = np.append(bad_record.astype(np.int64), self.signals.received or 0).view(np.int32)
        shape = (self.mesh.size, len(own))
        said = jax.make_array_from_callback(shape, self._of_device, lambda _: own[None])
        return self._gather(said)

    def hear(self, word: Word) -> np.ndarray:
        """Waits for what all have said of a step: their bad records, int64 `[any]`.

        Every process hears the words in the same order, and knows of a signal to any of them from
        the same word on.
        """
        if self._count == 1:
            return word
        said = np.ascontiguousarray(word).view(np.int64)  # [devices, rows + 1]
        self._agreed = max(self._agreed, int(said[:, -1].max()))
        return said[:, :-1].ravel()
