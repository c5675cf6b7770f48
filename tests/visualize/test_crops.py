"""The crops sheet is checked pixel by pixel, where its content is known."""

import functools

import numpy as np

from dinov2_jax.augment import augment
from dinov2_jax.data.batch import AUGMENT_COLUMNS, Batch
from dinov2_jax.visualize import sheets
from dinov2_jax.visualize.crops import crops_sheet, masks_of_images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MARGIN, GAP = sheets.MARGIN_PX, sheets.GAP_PX
TOP = MARGIN + sheets.TITLE_PX + 2 * sheets.LINE_PX
GLOBAL_PX, LOCAL_PX, PATCH = 32, 16, 8
ZOOM = 4  # of 32 px to about 140
TILE = GLOBAL_PX * ZOOM
AUGMENT = functools.partial(augment, mean=MEAN, std=STD)


def flat_batch(num_local: int = 4) -> Batch:
    """Four images in two groups; crop v of image i is the flat colour (40 i, 20 v, 100)."""
    b, s, q, n = 4, 2, 2, (GLOBAL_PX // PATCH) ** 2

    def crops(num: int, size: int) -> np.ndarray:
        out = np.empty((b, num, size, size, 3), np.uint8)
        out[..., 0] = 40 * np.arange(b)[:, None, None, None]
        out[..., 1] = 20 * np.arange(num)[None, :, None, None]
        out[..., 2] = 100
        return out

    def neutral(num: int) -> np.ndarray:
        params = np.zeros((b, num, len(AUGMENT_COLUMNS)), np.float32)
        params[
            ..., [AUGMENT_COLUMNS.index(x) for x in ("brightness", "contrast", "saturation")]
        ] = 1
        return params

    masks = np.zeros((s, 2 * q, n), bool)
    masks[1, 1 * q + 0, 6] = True  # image 2, crop 1: patch 6 is row 1, column 2
    return Batch(
        global_crops=crops(2, GLOBAL_PX),
        local_crops=crops(num_local, LOCAL_PX),
        global_augment=neutral(2),
        local_augment=neutral(num_local),
        masks=masks,
        mask_indices=np.zeros((s, 4), np.int32),
        mask_weights=np.zeros((s, 4), np.float32),
        index=np.arange(b),
        bad_record=np.full(b, -1),
    )


def draw(batch: Batch, **settings) -> np.ndarray:
    sheet = crops_sheet(batch, augment=AUGMENT, mean=MEAN, std=STD, patch_size=PATCH, **settings)
    return np.asarray(sheet.draw())


def tile_at(sheet: np.ndarray, row: int, left: int, size: int) -> np.ndarray:
    top = TOP + row * (TILE + 2 * GAP + GAP)  # two rows of local crops are a gap higher
    return sheet[top : top + size, left : left + size].astype(int)


def test_crops_sheet_shows_what_the_network_gets():
    batch = flat_batch()
    batch.global_augment[1, 0, AUGMENT_COLUMNS.index("jitter")] = 1
    batch.global_augment[1, 0, AUGMENT_COLUMNS.index("brightness")] = 0.5
    sheet = draw(batch)
    student = MARGIN + 2 * TILE + GAP + MARGIN
    local = student + 2 * TILE + GAP + MARGIN
    for i in range(4):
        for crop in range(2):
            color = np.array([40 * i, 20 * crop, 100])
            if (i, crop) == (1, 0):
                color = color / 2  # the augmentation is in the picture
            seen = tile_at(sheet, i, MARGIN + crop * (TILE + GAP), TILE)
            assert np.abs(seen - color).max() <= 1
            masked = tile_at(sheet, i, student + crop * (TILE + GAP), TILE)
            is_hidden = np.zeros((TILE, TILE), bool)
            if (i, crop) == (2, 1):
                is_hidden[
                    1 * PATCH * ZOOM : 2 * PATCH * ZOOM, 2 * PATCH * ZOOM : 3 * PATCH * ZOOM
                ] = 1
            assert np.abs(masked[~is_hidden] - color).max() <= 1
            assert set(masked[is_hidden].ravel()) <= {128, 160}
            assert is_hidden.sum() == 0 or len(set(masked[is_hidden].ravel())) == 2
        for crop in range(4):
            left = local + (crop // 2) * (TILE // 2 + GAP)
            row_top = (crop % 2) * (TILE // 2 + GAP)
            seen = tile_at(sheet, i, left, TILE + GAP)[row_top:, : TILE // 2][: TILE // 2]
            assert np.abs(seen - [40 * i, 20 * crop, 100]).max() <= 1


def test_crops_sheet_leaves_out_what_there_is_not():
    full = draw(flat_batch())
    no_locals = draw(flat_batch(num_local=0))
    assert full.shape[1] - no_locals.shape[1] == MARGIN + TILE + GAP
    unmasked = flat_batch(num_local=0)
    unmasked.masks[:] = False
    assert no_locals.shape[1] - draw(unmasked).shape[1] == MARGIN + 2 * TILE + GAP
    assert draw(flat_batch(), num_images=2).shape[0] < full.shape[0]


def test_masks_are_unpooled_crop_by_crop():
    s, g, q, n = 3, 2, 4, 5
    masks = np.random.default_rng(0).random((s, g * q, n)) < 0.5
    ours = masks_of_images(masks, num_global=g)
    for i in range(s * q):
        for a in range(g):
            np.testing.assert_array_equal(ours[i, a], masks[i // q, a * q + i % q])
