"""iBOT's block masks of one group of global crops, as static-size index lists.

Behaviour follows dinov2/data/masking.py (blocks) and dinov2/data/collate.py (how many, and where);
the draws are taken in the reference's order, so that the same draws give the same masks.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np

_MIN_BLOCK_PATCHES = 4
_MIN_BLOCK_ASPECT = 0.3  # rows over columns, up to the inverse
_NUM_BLOCK_TRIES = 10
_NUM_DRAWS_AT_ONCE = 256  # one call of the generator costs as much as some hundred numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockMasks:
    """Draws the masks of a group.

    Attributes:
      rows, cols: of the patch grid of a global crop.
      num_crops: global crops in the group, twice its images.
      mask_probability: share of the crops that are masked; 0 turns masking off.
      mask_ratio_min, mask_ratio_max: share of a masked crop's patches that is hidden.
    """

    rows: int
    cols: int
    num_crops: int
    mask_probability: float = 0.5
    mask_ratio_min: float = 0.1
    mask_ratio_max: float = 0.5

    def __post_init__(self):
        if min(self.rows, self.cols, self.num_crops) < 1:
            raise ValueError(
                f"{self.rows=}, {self.cols=} and {self.num_crops=} must be positive; "
                "a crop must hold at least one patch"
            )
        if not 0 <= self.mask_probability <= 1:
            raise ValueError(f"{self.mask_probability=} must lie in [0, 1]; 0 turns masking off")
        if not 0 <= self.mask_ratio_min <= self.mask_ratio_max <= 1:
            raise ValueError(
                f"{self.mask_ratio_min=} and {self.mask_ratio_max=} must be shares, "
                "the first not above the second"
            )

    @property
    def num_masked_crops(self) -> int:
        """Crops with a mask, the same number in every group."""
        return int(self.num_crops * self.mask_probability)

    @functools.cached_property
    def max_masked_patches(self) -> int:
        """m: length of the index lists, enough for every draw (the reference's `upperbound`)."""
        edges = _ratio_edges(self.mask_ratio_min, self.mask_ratio_max, self.num_masked_crops)
        return sum(int(self.rows * self.cols * edge) for edge in edges[1:])

    def __call__(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draws one group.

        The masked crops' shares are spread over the range: crop i of the masked ones draws its
        share from the i-th of equal parts; then all crops are shuffled.

        Returns:
          masks: bool [num_crops, n], True: hidden from the student.
          mask_indices: int32 [m], tokens of the flattened [num_crops, n]; padding is 0.
          mask_weights: float32 [m], 1 / (masked patches of that crop); padding is 0.
        """
        num_patches = self.rows * self.cols
        masks = np.zeros((self.num_crops, num_patches), bool)
        mask_indices = np.zeros(self.max_masked_patches, np.int32)
        mask_weights = np.zeros(self.max_masked_patches, np.float32)
        if not self.num_masked_crops:
            return masks, mask_indices, mask_weights
        draws = _draws(rng)
        edges = _ratio_edges(self.mask_ratio_min, self.mask_ratio_max, self.num_masked_crops)
        for i, (low, high) in enumerate(itertools.pairwise(edges)):
            ratio = min(low + (high - low) * next(draws), high)  # rounding may pass `high`
            target = int(num_patches * ratio)
            masks[i] = block_mask(self.rows, self.cols, target, draws)
        masks = masks[rng.permutation(self.num_crops)]

        tokens = np.flatnonzero(masks)
        per_crop = masks.sum(axis=1)
        mask_indices[: len(tokens)] = tokens
        mask_weights[: len(tokens)] = np.repeat(1 / np.maximum(per_crop, 1), per_crop)
        return masks, mask_indices, mask_weights


def block_mask(rows: int, cols: int, target: int, draws: Iterator[float]) -> np.ndarray:
    """Adds random rectangles until `target` patches are hidden or no more fits.

        while hidden < target:
            try up to 10 rectangles: area uniform in [4, room], aspect uniform in its logarithm
            take the first that hides at least one new patch and at most `room` new ones
            stop if none did

    where room = min(target - hidden, half the rows times the columns: 128 patches at 224 px / 14).

    Args:
      rows, cols: of the patch grid.
      target: patches to hide; never exceeded, and seldom missed.
      draws: uniform numbers in [0, 1), four a try.

    Returns:
      bool [rows * cols].
    """
    max_block_patches = (rows // 2) * cols
    min_log_aspect = math.log(_MIN_BLOCK_ASPECT)
    hidden = 0  # a bit for each patch: counting an overlap is then one operation
    num_hidden = 0
    while num_hidden < target:
        room = min(target - num_hidden, max_block_patches)
        for _ in range(_NUM_BLOCK_TRIES):
            area = _MIN_BLOCK_PATCHES + (room - _MIN_BLOCK_PATCHES) * next(draws)
            aspect = math.exp(min_log_aspect + -2 * min_log_aspect * next(draws))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if width >= cols or height >= rows:
                continue
            top = int(next(draws) * (rows - height + 1))
            left = int(next(draws) * (cols - width + 1))
            block = _rows_of_bits(height, cols) * ((1 << width) - 1) << (top * cols + left)
            num_new = height * width - (hidden & block).bit_count()
            if 0 < num_new <= room:
                hidden |= block
                num_hidden += num_new
                break
        else:
            break
    num_patches = rows * cols
    packed = np.frombuffer(hidden.to_bytes(-(-num_patches // 8), "little"), np.uint8)
    return np.unpackbits(packed, count=num_patches, bitorder="little").astype(bool)


@functools.cache
def _rows_of_bits(height: int, cols: int) -> int:
    """The first bit of each of `height` rows."""
    return sum(1 << (row * cols) for row in range(height))


def _draws(rng: np.random.Generator) -> Iterator[float]:
    while True:
        yield from rng.random(_NUM_DRAWS_AT_ONCE).tolist()


def _ratio_edges(low: float, high: float, num_parts: int) -> list[float]:
    """The ends of equal parts of [low, high]: num_parts + 1 numbers.

    In float64: the reference's float32 `torch.linspace` differs in its last bit from one processor
    to the next, which may move a target, and `max_masked_patches`, by one patch.
    """
    return np.linspace(low, high, num_parts + 1).tolist()
