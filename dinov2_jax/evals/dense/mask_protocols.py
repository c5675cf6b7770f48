"""Sizes of the segmentation protocols, for training and testing.

Facts: mmcv configurations of the reference's released heads, at 512 ("linear") and 640 px ("ms").
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from dinov2_jax.evals.dense.fit import Views
from dinov2_jax.evals.dense.mask_views import MaskAugment, fixed_view, padded
from dinov2_jax.evals.dense.predict import Slide, normalise


class Sizes(NamedTuple):
    """Of a protocol; in pixels, and as ratios."""

    short_side: int  # the crop's too
    train_ratio: tuple[float, float]
    stride: int
    test_ratios: tuple[float, ...] = (1.0,)
    flip: bool = False


PROTOCOLS = {
    "linear": Sizes(512, (0.5, 2.0), 341),
    "ms": Sizes(640, (1.0, 3.0), 320, (1.0, 1.32, 1.73, 2.28, 3.0), flip=True),
    "knn": Sizes(512, (1.0, 1.0), 341),
}


def make_slide(
    name: str,
    *,
    short_side_px: int | None = None,
    crop_px: int | None = None,
    stride_px: int | None = None,
    ratios: Sequence[float] | None = None,
    flip: bool | None = None,
) -> Slide:
    """How images are tested: the protocol's sizes, with what is given in their place.

    A crop that is not given is the short side; a stride keeps its share of the crop.

    Raises:
      ValueError: the stride is larger than the crop, so that windows leave gaps.
    """
    sizes = PROTOCOLS[name]
    short_side_px = short_side_px or sizes.short_side
    crop_px = crop_px or short_side_px
    stride_px = stride_px or max(round(crop_px * sizes.stride / sizes.short_side), 1)
    if stride_px > crop_px:
        raise ValueError(
            f"stride {stride_px} px must not exceed the crop of {crop_px} px: windows would leave "
            "gaps; lower --stride"
        )
    return Slide(
        short_side_px=short_side_px,
        crop_px=crop_px,
        stride_px=stride_px,
        ratios=tuple(ratios or sizes.test_ratios),
        flip=sizes.flip if flip is None else flip,
    )


def make_views(
    name: str, slide: Slide, *, mean: Sequence[float], std: Sequence[float], is_cached: bool
) -> Views:
    """What a head is trained on.

    Args:
      name: among `PROTOCOLS`.
      slide: of the test; size and crop are those of training too.
      mean, std: of the network's input.
      is_cached: whether views are fixed.

    Raises:
      ValueError: fixed views would not all have one size.
    """
    crop_px, short_side_px = slide.crop_px, slide.short_side_px
    if is_cached and crop_px > short_side_px:
        raise ValueError(
            f"crop {crop_px} px must not exceed the short side of {short_side_px} px where views "
            "are cached; lower --crop"
        )
    augment = MaskAugment(
        short_side_px=short_side_px, ratio=PROTOCOLS[name].train_ratio, crop_px=crop_px
    )

    def random(image: Any, classes: Any, rng: Any):
        image, classes = augment(image, classes, rng)
        return padded(normalise(image, mean, std), classes, side_px=crop_px)

    return Views(
        random=random,
        fixed=functools.partial(fixed_view, short_side_px=short_side_px, crop_px=crop_px),
        size_px=(crop_px, crop_px),
        settings=f"{'centre' if is_cached else augment} {short_side_px} {crop_px}",
    )
