"""What a compiled step needs of a device's memory, or by how much it was refused."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from dinov2_jax.cost.chips import Chip

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"


class CompilerError(RuntimeError):
    """A compiler that fails for another reason than memory; its text is the compiler's."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Of one device, in bytes.

    Attributes:
      fits: whether the compiler made a program.
      peak_bytes: what it needs at most; limit_bytes: what there is.
      by_kind: the parts of the peak, where the compiler says them.
    """

    fits: bool
    peak_bytes: int
    limit_bytes: int
    by_kind: Mapping[str, int]


def memory_of(compiled: Any, chip: Chip) -> Memory:
    """The memory of a compiled program: arguments (which donated outputs reuse) and temporaries."""
    stats = compiled.memory_analysis()
    by_kind = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "program": stats.generated_code_size_in_bytes,
    }
    peak = sum(by_kind.values())
    return Memory(peak <= chip.hbm_bytes, peak, chip.hbm_bytes, by_kind)


def memory_of_failure(message: str, chip: Chip, *, argument_bytes: int = 0) -> Memory:
    """What the compiler's refusal says.

    Args:
      message: the refusal. A program that is refused early states its temporaries alone.
      chip: that it is for.
      argument_bytes: of the program, which such a refusal leaves out.

    Raises:
      CompilerError: it refuses for another reason than memory.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        raise CompilerError(f"the compiler failed: {message}")
    if early := re.search(rf"temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)", message):
        by_kind = {"arguments": argument_bytes, "temporaries": _num_bytes(early[1], early[2])}
        return Memory(False, sum(by_kind.values()), _num_bytes(early[3], early[4]), by_kind)
    used = re.search(rf"[Uu]sed {_SIZE} of {_SIZE} hbm", message)
    if used is None:
        raise CompilerError(f"the compiler's refusal is not understood: {message}")
    by_kind = {
        kind: _num_bytes(number, unit)
        for kind, number, unit in re.findall(
            rf"^\s+(arguments|program|reserved|HLO temp|global|output)\s*:?\s+{_SIZE}",
            message,
            re.MULTILINE,
        )
    }
    return Memory(False, _num_bytes(used[1], used[2]), _num_bytes(used[3], used[4]), by_kind)


def _num_bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])
