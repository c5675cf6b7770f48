"""The batch: what the host hands to the device at every step. Numpy only.

The leading axis of every field is the batch (or the groups, which partition it in order), so that
one sharding rule, over that axis, serves them all.
"""

from typing import NamedTuple

import numpy as np

# Columns of the per-crop augmentation parameters, float32. Applied by `dinov2_jax.augment` in
# this order: jitter (four operations in the order `jitter_order` names), greyscale, blur, solarize.
AUGMENT_COLUMNS = (
    "jitter",  # 1: apply the four jitter operations, 0: leave the colours alone
    "brightness",  # factor
    "contrast",  # factor
    "saturation",  # factor
    "hue",  # shift in turns, [-0.5, 0.5]
    "jitter_order",  # 0..23: index into itertools.permutations of the four, in the order above
    "grayscale",  # 1: apply
    "blur_sigma",  # in px; 0: no blur
    "solarize",  # 1: apply
)


class Batch(NamedTuple):
    """Host batch. `b` images in `s` groups of `q`: image `i` belongs to group `i // q`."""

    global_crops: np.ndarray  # uint8 [b, g=2, height, width, c]
    local_crops: np.ndarray  # uint8 [b, l, height, width, c]; l may be 0
    global_augment: np.ndarray  # float32 [b, g, len(AUGMENT_COLUMNS)]
    local_augment: np.ndarray  # float32 [b, l, len(AUGMENT_COLUMNS)]
    # iBOT. Inside a group the 2q global crops are pooled crop-major, as on one GPU of the
    # reference: crop a of image i is row `a * q + i`, its patch p is token `(a * q + i) * n + p`.
    masks: np.ndarray  # bool [s, g * q, n], True: hidden from the student
    mask_indices: np.ndarray  # int32 [s, m], tokens of the group; padding is 0
    mask_weights: np.ndarray  # float32 [s, m], 1 / (masked patches of that crop); padding is 0
    index: np.ndarray  # int64 [b], position in the global order
    # Record of the source that could not be read and was replaced, or -1. int64 [b]
    bad_record: np.ndarray


def batch_layout(
    *,
    images: int,
    groups: int,
    global_crop_size_px: int,
    local_crop_size_px: int,
    num_local_crops: int,
    num_channels: int,
    crops_per_group: int,
    patches: int,
    max_masked_patches: int,
) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shape and type of every field of a `Batch`, by its name.

    Args:
      images, groups: b and s.
      global_crop_size_px, local_crop_size_px, num_local_crops, num_channels: the crops.
      crops_per_group: global crops of a group, 2q.
      patches: n, of a global crop.
      max_masked_patches: m, slots of a group.
    """
    large, small, columns = global_crop_size_px, local_crop_size_px, len(AUGMENT_COLUMNS)
    num_global = crops_per_group * groups // images
    return {
        "global_crops": ((images, num_global, large, large, num_channels), np.uint8),
        "local_crops": ((images, num_local_crops, small, small, num_channels), np.uint8),
        "global_augment": ((images, num_global, columns), np.float32),
        "local_augment": ((images, num_local_crops, columns), np.float32),
        "masks": ((groups, crops_per_group, patches), np.bool_),
        "mask_indices": ((groups, max_masked_patches), np.int32),
        "mask_weights": ((groups, max_masked_patches), np.float32),
        "index": ((images,), np.int64),
        "bad_record": ((images,), np.int64),
    }
