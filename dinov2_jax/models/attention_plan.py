"""How the attention kernels cut their arrays: blocks, grid, vector memory and stated cost."""

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dinov2_jax.models.tpu_tiles import LANES, MIB, round_up

ROWS = 16  # of a tile of bfloat16
MAX_QUERIES = 640  # in one step, counted over the heads of a group; more take several steps


class Plan:
    """How the arrays are cut: grid of (images, groups of heads, steps over the queries).

    A block may reach beyond the array: there it holds anything, NaN included.
    """

    def __init__(self, b: int, n: int, d3: int, hd: int):
        self.n, self.hd = n, hd
        self.b, self.d = b, d3 // 3
        self.width = max(LANES, hd)
        self.heads = self.width // hd  # of a group
        self.groups = self.d // self.width
        whole = round_up(n, ROWS)
        if round_up(self.heads * whole, LANES) <= MAX_QUERIES:
            self.rows, self.steps = whole, 1
        else:
            self.rows = max(2 * LANES // self.heads, ROWS)
            self.steps = pl.cdiv(n, self.rows)
        self.keys = self.rows * self.steps
        self.images = min(b, max(1, 256 // self.keys))
        self.grid = (pl.cdiv(b, self.images), self.groups, self.steps)
        self.query_spec = pl.BlockSpec(
            (self.images, self.rows, self.width), lambda image, group, step: (image, step, group)
        )

    def _all_rows(self, part: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (self.images, self.keys, self.width),
            lambda image, group, step: (image, 0, part * self.groups + group),
        )

    @property
    def qkv_specs(self) -> list[pl.BlockSpec]:
        """Of queries, keys and values, all inside the one fused array."""
        return [self.query_spec, self._all_rows(1), self._all_rows(2)]

    def cost(self, *, products: int, num_bytes: int) -> pl.CostEstimate:
        """Of one call: the products in whole tiles of the matrix unit, which is what they take."""
        unit = pltpu.get_tpu_info().mxu_column_size if pltpu.is_tpu_device() else LANES
        queries, runs = self.heads * self.rows, self.b * self.groups * self.steps
        tiles = 2 * self.keys * round_up(queries, unit) * round_up(self.width, unit)
        return pl.CostEstimate(
            flops=products * tiles * runs,
            transcendentals=self.keys * round_up(queries, LANES) * runs,
            bytes_accessed=num_bytes,
        )

    def vmem_bytes(self, itemsize: int) -> int:
        """What the backward kernel needs: its result twice, and six arrays of logits."""
        result = self.images * self.keys * 3 * self.d * itemsize
        logits = self.keys * round_up(self.heads * self.rows, LANES) * 4
        return 2 * result + 6 * logits

    def compiler_params(self, semantics: str, itemsize: int) -> pltpu.CompilerParams:
        """`semantics`: whether steps and groups may run in any order."""
        return pltpu.CompilerParams(
            dimension_semantics=("parallel", semantics, semantics),
            vmem_limit_bytes=max(16 * MIB, self.vmem_bytes(itemsize)),
        )


def padded_heads(num_heads: int, hd: int) -> tuple[int, int]:
    """Number and width of the heads that the kernels see: whole groups, of whole lanes."""
    width = 1 << (hd - 1).bit_length() if hd < LANES else round_up(hd, LANES)
    return round_up(num_heads, max(1, LANES // width)), width
