"""Reads what XLA's optimised HLO text says about cost: cycles, loops, collectives, kernels.

In: `compiled.as_text()`. Out: plain numbers. The TPU compiler notes `estimated_cycles` beside every
instruction that it costs; a loop's body is written once, so each computation is counted as often
as its loops turn.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Custom calls that are kernels of the program, not marks of the compiler.
KERNEL_TARGETS = ("tpu_custom_call", "__cudnn", "__gpu$xla.gpu.triton")

_ITEM_BITS = {"pred": 8, "token": 0, "s4": 4, "u4": 4, "bf16": 16, "f16": 16, "c64": 64}
_HEADER = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the program.

    Attributes:
      name, opcode: as written.
      shape: text of the result's type.
      rest: everything behind the opening bracket of the operands.
      times: how often the step runs it.
      computation: that it stands in.
      is_fused: whether that is a fusion's, whose cost its caller states.
    """

    name: str
    opcode: str
    shape: str
    rest: str
    times: int
    computation: str
    is_fused: bool

    @property
    def cycles(self) -> int:
        """The compiler's estimate for one run; 0 if it makes none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else 0

    @property
    def scope(self) -> str:
        """The path of named scopes that it came from; "" where the compiler made it up."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def called(self) -> str:
        """The computation that a fusion or call runs, or ""."""
        found = re.search(r"\b(?:calls|to_apply)=%([\w.-]+)", self.rest)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
      kind: its opcode without "-start"; "dcn" for a transfer between slices.
      num_bytes: of its whole result (its operand for reduce-scatter), on one device.
      group_size: devices that take part in one exchange.
      times: how often the step runs it.
      scope: see `Instruction`.
      dtype: of its first array.
    """

    kind: str
    num_bytes: int
    group_size: int
    times: int
    scope: str
    dtype: str


class Program:
    """An HLO module: its computations, and how often each runs.

    Attributes:
      unknown_loops: names of the loops whose turns could not be read; they count once.
    """

    def __init__(self, text: str):
        self._lines: dict[str, list[re.Match]] = {}
        self._entry = ""
        self.unknown_loops: list[str] = []
        lines = None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                lines = self._lines.setdefault(header[2], [])
                self._entry = header[2] if header[1] else self._entry
            elif lines is not None and (found := _INSTRUCTION.match(line)):
                lines.append(found)
        if not self._entry:
            raise ValueError("the text has no ENTRY computation; pass compiled.as_text()")
        self._num_devices = int((re.search(r"num_partitions=(\d+)", text) or [0, 1])[1])
        self.instructions = list(self._walk(self._entry, times=1, is_fused=False))

    def _walk(self, computation: str, *, times: int, is_fused: bool) -> Iterator[Instruction]:
        for found in self._lines.get(computation, ()):
            name, shape, opcode, rest = found.groups()
            yield Instruction(name, opcode, shape, rest, times, computation, is_fused)
            if opcode == "while":
                turns = self.trip_count(rest)
                if turns is None:
                    self.unknown_loops.append(name)
                body = re.search(r"\bbody=%([\w.-]+)", rest)[1]
                yield from self._walk(body, times=times * (turns or 1), is_fused=is_fused)
            elif opcode in ("fusion", "call", "async-start", "call-start"):
                if called := re.search(r"\b(?:calls|to_apply)=%([\w.-]+)", rest):
                    # Cores beside the one that is timed ("call-start") state no usable cycles.
                    inside = is_fused or opcode in ("fusion", "call-start")
                    yield from self._walk(called[1], times=times, is_fused=inside)
            elif opcode == "conditional":
                for branch in re.findall(r"%([\w.-]+)", rest.partition("_computation")[2]):
                    yield from self._walk(branch, times=times, is_fused=is_fused)

    def trip_count(self, rest: str) -> int | None:
        """Turns of a while loop, given its attributes; None if they cannot be read.

        From the compiler's own note, or from the condition: a counter, from 0 by 1, below a
        constant.
        """
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', rest):
            return int(known[1])
        condition = re.search(r"\bcondition=%([\w.-]+)", rest)
        bounds = [
            int(line[4].split(")")[0])
            for line in self._lines.get(condition[1] if condition else "", ())
            if line[3] == "constant" and re.match(r"[su]32\[\]", line[2])
        ]
        return bounds[0] if len(bounds) == 1 and bounds[0] > 0 else None

    def costed(self) -> list[Instruction]:
        """The instructions that the compiler gives cycles, those inside fusions left to these."""
        return [i for i in self.instructions if not i.is_fused and i.cycles]

    def kernels(self) -> list[Instruction]:
        """Custom calls that run a kernel."""
        return [
            i
            for i in self.instructions
            if i.opcode == "custom-call"
            and any(f'custom_call_target="{target}' in i.rest for target in KERNEL_TARGETS)
        ]

    def has_product(self, instruction: Instruction) -> bool:
        """Whether it is, or fuses, a matrix product."""
        products = ("convolution", "dot")
        if instruction.opcode in products:
            return True
        return instruction.opcode == "fusion" and any(
            inner[3] in products for inner in self._lines.get(instruction.called, ())
        )

    def collectives(self) -> list[Collective]:
        """Every collective once: of one that is spread over fusions there are several copies."""
        found: dict[str, Collective] = {}
        for i in self.instructions:
            kind = i.opcode.removesuffix("-start")
            is_dcn = i.opcode == "send" and "megascale" in i.rest
            if kind not in COLLECTIVES and not is_dcn:
                continue
            channel = re.search(r"channel_id=(\d+)", i.rest)
            # Channels alone do not tell collectives apart, and copies may differ in layout.
            key = f"{channel[1]} {kind} {_SHAPE.findall(i.shape)}" if channel else i.name
            group_size = self.group_size(i.rest)
            arrays = array_bytes(i.shape)
            num_bytes = sum(arrays)
            if is_dcn:
                kind, num_bytes = "dcn", arrays[0]
            elif kind == "all-reduce" and i.computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # how a TPU writes it: an all-reduce that is cut at once
            elif kind == "reduce-scatter" and kind == i.opcode:
                num_bytes *= group_size
            elif kind != i.opcode and kind != "all-reduce":
                # An asynchronous start has its operands and its results: the larger side of two
                # that differ by the group, or one of two equal ones.
                is_cut = kind in ("all-gather", "reduce-scatter")
                share = group_size / (group_size + 1) if is_cut else 1 / 2
                num_bytes = round(num_bytes * share)
            dtype = (_SHAPE.search(i.shape) or ["", ""])[1]
            new = Collective(kind, num_bytes, group_size, i.times, i.scope, dtype)
            if key not in found or new.times > found[key].times:
                found[key] = new
        return list(found.values())

    def group_size(self, rest: str) -> int:
        """Devices in one group of a collective's `replica_groups`; all where it names none."""
        if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
            return listed[1].count(",") + 1
        if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
            return int(iota[1])
        # mesh[the axes and their sizes], perhaps device_ids=(...), {the axes that take part}
        if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
            return math.prod(int(sizes.get(axis, 1)) for axis in re.findall(r"'(\w+)'", mesh[2]))
        return self._num_devices


def array_bytes(shape: str) -> list[int]:
    """Bytes of each array in the text of a type, layouts and padding left out."""
    sizes = []
    for dtype, dims in _SHAPE.findall(shape):
        digits = re.search(r"\d+", dtype)
        bits = _ITEM_BITS.get(dtype) or (int(digits[0]) if digits else 0)
        sizes.append(math.prod(int(d) for d in dims.split(",") if d) * bits // 8)
    return sizes
