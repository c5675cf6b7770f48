"""Pictures are checked pixel by pixel where their content is known."""

import functools

import numpy as np
import pytest

from dinov2_jax import pictures
from dinov2_jax.augment import augment
from dinov2_jax.data.batch import AUGMENT_COLUMNS, Batch
from dinov2_jax.data.records import BadImage, Record, Source

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MARGIN, GAP = pictures._MARGIN_PX, pictures._GAP_PX
TOP = MARGIN + pictures._TITLE_PX + 2 * pictures._LINE_PX
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
    sheet = pictures.crops_sheet(
        batch, augment=AUGMENT, mean=MEAN, std=STD, patch_size=PATCH, **settings
    )
    return np.asarray(sheet)


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
    ours = pictures.masks_of_images(masks, num_global=g)
    for i in range(s * q):
        for a in range(g):
            np.testing.assert_array_equal(ours[i, a], masks[i // q, a * q + i % q])


def planted_features() -> np.ndarray:
    """[3 photos, 16 patches, 7]: three hidden directions, of falling strength."""
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((48, 3))
    scores = np.linalg.qr(scores - scores.mean(axis=0))[0]  # uncorrelated, so that PCA finds them
    scores = (scores * [30.0, 10.0, 3.0]).reshape(3, 16, 3)
    directions = np.linalg.qr(rng.standard_normal((7, 7)))[0][:3]
    return scores @ directions + 5.0 + 0.01 * rng.standard_normal((3, 16, 7)), scores


def test_pca_colors_are_the_three_strongest_directions():
    features, scores = planted_features()
    colors = pictures.pca_colors(features)
    assert colors.shape == (3, 16, 3) and colors.dtype == np.uint8
    for i in range(3):
        correlation = np.corrcoef(colors[..., i].ravel(), scores[..., i].ravel())[0, 1]
        assert abs(correlation) > 0.98
        assert colors[..., i].min() == 0 and colors[..., i].max() == 255


def test_pca_signs_are_fixed():
    """Along axes, each colour must rise with its feature: an eigenvector may come negated."""
    _, scores = planted_features()
    for axes in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        colors = pictures.pca_colors(scores[..., axes])
        for i in range(3):
            assert np.corrcoef(colors[..., i].ravel(), scores[..., i].ravel())[0, 1] > 0.98


def test_pca_is_of_all_photos_together():
    features, _ = planted_features()
    features[2, 3] = features[0, 9]
    colors = pictures.pca_colors(features)
    np.testing.assert_array_equal(colors[2, 3], colors[0, 9])
    order = [2, 0, 1]
    np.testing.assert_array_equal(pictures.pca_colors(features[order]), colors[order])
    np.testing.assert_array_equal(pictures.pca_colors(3 * features - 7), colors)


def test_pca_of_collapsed_features_is_grey_and_of_nan_an_error():
    assert (pictures.pca_colors(np.full((2, 4, 6), 3.0)) == 128).all()
    features, _ = planted_features()
    features[1, 2, 3] = np.nan
    with pytest.raises(ValueError, match="patch features must be finite"):
        pictures.pca_colors(features)


def test_pca_sheet_has_a_photo_and_a_column_for_each_title():
    features, _ = planted_features()
    photos = [np.full((8, 8, 1), 60 * i, np.uint8) for i in range(3)]
    names = ["short", "a name far too long for two columns of pictures " * 2, "c"]
    columns = {"trained": features, "before": features[:, ::-1]}
    sheet = np.asarray(pictures.pca_sheet(photos, names, columns, tile_px=40, width_px=300)).astype(
        int
    )
    cell = 3 * 40 + 2 * GAP
    assert sheet.shape[1] == 2 * MARGIN + 2 * cell + MARGIN
    second_photo = sheet[TOP : TOP + 40, MARGIN + cell + MARGIN :][:, :40]
    assert (second_photo == 60).all()  # grey shown as grey
    colors = pictures.pca_colors(features)
    for column, expected in ((1, colors), (2, pictures.pca_colors(features[:, ::-1]))):
        tile = sheet[TOP : TOP + 40, MARGIN + column * (40 + GAP) :][:, :40]
        grid = tile.reshape(4, 10, 4, 10, 3)
        np.testing.assert_array_equal(grid[:, 0, :, 0], expected[0].reshape(4, 4, 3))
        np.testing.assert_array_equal(grid.min(axis=(1, 3)), grid.max(axis=(1, 3)))


class Photos(Source):
    path, kind, rejected = "p", "memory", ()

    def __len__(self):
        return 10

    def name(self, index):
        return f"photo {index}"

    def __getitem__(self, index):
        if index == 4:
            raise BadImage("gone")
        image = b"broken" if index == 6 else np.full((20, 30, 3), index, np.uint8)
        return Record(image, self.name(index), None)


def test_sample_photos_are_evenly_spaced_readable_squares():
    photos, names = pictures.sample_photos(Photos(), size_px=14, num_photos=5)
    assert names == ["photo 0", "photo 2", "photo 8"]
    assert [photo.shape for photo in photos] == [(14, 14, 3)] * 3
    assert [int(photo[0, 0, 0]) for photo in photos] == [0, 2, 8]
    assert len(pictures.sample_photos(Photos(), size_px=14, num_photos=50)[0]) == 8
