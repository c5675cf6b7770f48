"""How fast a step is: in images, and in FLOPs beside what the chips could do.

FLOPs are the matrix products of backbones and heads, see `cost.flops`; *model* FLOPs count every
image, *executed* ones those that drop path keeps. The peak is that of bfloat16, whatever the
compute type.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from dinov2_jax.cost.chips import chip_of

# The MFUs are there on chips with a known peak only.
FIELDS = (
    "step_secs",
    "images_per_sec",
    "images_per_sec_per_chip",
    "tflops_per_chip",
    "model_mfu",
    "executed_mfu",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """What one step is, and what it runs on.

    Attributes:
      images: of a step, over all devices.
      model_flops, executed_flops: likewise.
      devices: jax devices in use, all alike.
    """

    images: int
    model_flops: float
    executed_flops: float
    devices: Sequence[Any]

    def fields(self, step_secs: float) -> dict[str, float]:
        """`FIELDS` of a step that took so long; of executed FLOPs, 1e12 a second and chip."""
        chip = chip_of(self.devices[0].device_kind)
        num_chips = len(self.devices) / (chip.devices_per_chip if chip else 1)
        rates = {
            "step_secs": step_secs,
            "images_per_sec": self.images / step_secs,
            "images_per_sec_per_chip": self.images / step_secs / num_chips,
            "tflops_per_chip": self.executed_flops / step_secs / num_chips / 1e12,
        }
        if chip:
            possible = chip.peak_flops * len(self.devices) * step_secs
            rates["model_mfu"] = self.model_flops / possible
            rates["executed_mfu"] = self.executed_flops / possible
        return rates
