"""From a compiled program to seconds: the estimate's one formula, and where the time goes.

    seconds = sum over instructions of estimated_cycles x runs / clock
            + sum over kernels of max(FLOPs / peak, bytes / HBM bandwidth) x runs
            + sum over collectives of bytes on the busiest link / bandwidth x runs

Nothing is taken to overlap. `docs/pods.md` says what the figure is good for.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping

from dinov2_jax.cost.chips import Chip
from dinov2_jax.cost.hlo import Collective, Instruction, Program

# The parts of the step, by the first pattern that its scopes match.
PARTS = (
    ("augmentation", r"/augment/"),
    ("targets", r"/targets/"),
    ("heads", r"DINOHead|/head/|[/(]prototypes[/)]"),
    ("attention products", r"/attn/(qkv|proj)/"),
    ("attention", r"/attn/"),
    ("mlp", r"/mlp/"),
    ("blocks, the rest", r"/blocks/|backbone/while"),
    ("embedding", r"backbone"),
    # One fusion a leaf, named by the choice between the old and the new state.
    ("update", r"/optimizer/|/ema/|train_step\)/jit\(_where\)"),
    ("losses and metrics", r"student|teacher"),
)
# Bytes that each device sends, as a share of the bytes of the result.
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    # Half the ring's length on average, over both of its directions.
    "all-to-all": lambda n: (n - 1) / n * n / 4,
    "ragged-all-to-all": lambda n: (n - 1) / n * n / 4,
    "collective-permute": lambda n: 2.0,  # one direction only
    "collective-broadcast": lambda n: 1.0,
    "dcn": lambda n: 2.0,
}


@dataclasses.dataclass(frozen=True)
class Row:
    """Part of a step's time.

    Attributes:
      part: of `PARTS`, "collectives" or "not named".
      kind: "products", "copies", "kernels", "collectives" or "other".
      seconds: a step.
      what: the instruction, its shape and its scope.
    """

    part: str
    kind: str
    seconds: float
    what: str


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a step takes.

    Attributes:
      rows: every instruction that takes time, the longest first.
      collective_bytes: bytes of the results of the collectives of a step, by kind.
      warnings: what the figures leave out.
    """

    rows: list[Row]
    collective_bytes: Mapping[str, int]
    warnings: list[str]

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(row.seconds for row in self.rows)

    def table(self) -> dict[str, dict[str, float]]:
        """Seconds by part, then by kind; the longest part first."""
        found = collections.defaultdict(lambda: collections.defaultdict(float))
        for row in self.rows:
            found[row.part][row.kind] += row.seconds
        order = sorted(found, key=lambda part: -sum(found[part].values()))
        return {part: dict(found[part]) for part in order}


def estimate(program: Program, chip: Chip) -> Estimate:
    """The time of a step on one chip of many; see the module's formula."""
    rows, warnings = [], []
    for i in program.costed():
        rows.append(Row(part_of(i.scope), _kind(program, i), _cycles_seconds(i, chip), _what(i)))
    uncounted = []
    for i in program.kernels():
        if i.cycles:
            continue
        seconds = kernel_seconds(i.rest, chip)
        if seconds is None:
            uncounted.append(i.name)
        else:
            rows.append(Row(part_of(i.scope), "kernels", seconds * i.times, _what(i)))
    if uncounted:
        warnings.append(
            f"{len(uncounted)} kernels state no cost and count as nothing: {', '.join(uncounted)}"
        )
    if program.unknown_loops:
        warnings.append(
            f"loops whose turns are unknown count once: {', '.join(program.unknown_loops)}"
        )
    num_bytes = collections.Counter()
    for c in program.collectives():
        num_bytes[c.kind] += c.num_bytes * c.times
        what = f"{c.kind} of {c.num_bytes / 1e6:.3g} MB {c.dtype} over {c.group_size}  {c.scope}"
        rows.append(Row("collectives", "collectives", collective_seconds(c, chip) * c.times, what))
    return Estimate(sorted(rows, key=lambda row: -row.seconds), dict(num_bytes), warnings)


def part_of(scope: str) -> str:
    """The part of the step that an instruction's scope belongs to."""
    for part, pattern in PARTS:
        if re.search(pattern, scope):
            return part
    return "not named"


def collective_seconds(collective: Collective, chip: Chip) -> float:
    """One run of a collective as a ring over one axis of the torus, or over the DCN."""
    sent = collective.num_bytes * _SENT[collective.kind](collective.group_size)
    return sent / (chip.dcn_bandwidth if collective.kind == "dcn" else chip.ring_bandwidth)


def kernel_seconds(attributes: str, chip: Chip) -> float | None:
    """One run of a kernel, by the roofline of the cost that it states; None if it states none."""
    stated = {
        name: float(number)
        for name, number in re.findall(
            r'"?(flops|bytes_accessed)\\?"?\s*[:=]\s*\\?"?(\d+)', attributes
        )
    }
    if not stated:
        return None
    return max(
        stated.get("flops", 0.0) / chip.peak_flops,
        stated.get("bytes_accessed", 0.0) / chip.hbm_bandwidth,
    )


def _cycles_seconds(instruction: Instruction, chip: Chip) -> float:
    return instruction.cycles * instruction.times / chip.clock_hz if chip.clock_hz else 0.0


def _kind(program: Program, instruction: Instruction) -> str:
    if program.has_product(instruction):
        return "products"
    if instruction.opcode in ("copy", "transpose", "reshape") or "copy" in instruction.name:
        return "copies"
    return "other"


def _what(i: Instruction) -> str:
    shape = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", i.shape)
    shape = shape if len(shape) <= 60 else f"{shape[:57]}..."
    times = f"{i.times} x " if i.times > 1 else ""
    return f"{times}{i.name} {shape}  {i.scope}"
