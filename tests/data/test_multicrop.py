"""Crops by torchvision's law, and the distribution of the augmentation parameters."""

import math

import numpy as np
import pytest

from dinov2_jax.data.batch import AUGMENT_COLUMNS
from dinov2_jax.data.image_ops import resize_box, to_pillow
from dinov2_jax.data.multicrop import MultiCrop, crop_box, random_resized_crop
from tests.data.conftest import make_image

RATIO = (3 / 4, 4 / 3)


def _torchvision_box(height, width, scale, ratio, uniform, randint):
    """RandomResizedCrop.get_params step by step; returns top, left, height, width."""
    for _ in range(10):
        target_area = height * width * uniform(*scale)
        aspect_ratio = math.exp(uniform(math.log(ratio[0]), math.log(ratio[1])))
        w = round(math.sqrt(target_area * aspect_ratio))
        h = round(math.sqrt(target_area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            i = randint(0, height - h)
            j = randint(0, width - w)
            return i, j, h, w
    in_ratio = width / height
    if in_ratio < min(ratio):
        w = width
        h = round(w / min(ratio))
    elif in_ratio > max(ratio):
        h = height
        w = round(h * max(ratio))
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32), (1e-9, 1e-8), (0.9, 1.0)])
@pytest.mark.parametrize(
    "height, width", [(40, 60), (60, 40), (7, 900), (900, 7), (1, 1), (50, 50)]
)
def test_boxes_are_torchvisions(scale, height, width):
    rng = np.random.default_rng(0)
    for _ in range(200):
        draws = rng.random((10, 4))
        numbers = iter(draws.ravel().tolist())
        used = []

        def number(numbers=numbers, used=used):
            used.append(next(numbers))
            return used[-1]

        def uniform(a, b, number=number, used=used):
            # A try that did not fit leaves its two position numbers unused.
            if len(used) % 4 == 2 and (a, b) == scale:
                number(), number()
            return a + (b - a) * number()

        top, left, h, w = _torchvision_box(
            height, width, scale, RATIO, uniform, lambda a, b, n=number: a + int(n() * (b - a + 1))
        )
        box = crop_box(height, width, draws.tolist(), scale=scale, aspect_ratio=RATIO)
        assert box == (left, top, left + w, top + h)


def test_boxes_are_spread_like_torchvisions():
    """Against other random numbers, drawn by Python: means of area, aspect and position."""
    import random

    python_rng = random.Random(0)
    numpy_rng = np.random.default_rng(0)
    theirs = np.array(
        [
            _torchvision_box(300, 500, (0.05, 0.32), RATIO, python_rng.uniform, python_rng.randint)
            for _ in range(4000)
        ]
    )
    boxes = np.array(
        [
            crop_box(
                300, 500, numpy_rng.random((10, 4)).tolist(), scale=(0.05, 0.32), aspect_ratio=RATIO
            )
            for _ in range(4000)
        ]
    )
    left, top, right, bottom = boxes.T
    ours = np.stack([top, left, bottom - top, right - left], axis=1)
    for a, b in zip(ours.T, theirs.T, strict=True):
        quantiles = np.linspace(0.02, 0.98, 25)
        error = np.abs(np.quantile(a, quantiles) - np.quantile(b, quantiles))
        assert error.max() < 0.1 * (np.quantile(b, 0.98) - np.quantile(b, 0.02))


def _cut(multicrop, image, seed=0):
    global_size, local_size = multicrop.global_crop_size_px, multicrop.local_crop_size_px
    channels = image.shape[2]
    global_crops = np.zeros((2, global_size, global_size, channels), np.uint8)
    local_crops = np.zeros((multicrop.num_local_crops, local_size, local_size, channels), np.uint8)
    multicrop(
        image, np.random.default_rng(seed), global_crops=global_crops, local_crops=local_crops
    )
    return global_crops, local_crops


def test_crops_show_parts_of_the_size_asked_for():
    """On an image whose two channels are its coordinates, a crop's range is its extent."""
    height, width = 200, 256
    rows, cols = np.mgrid[:height, :width]
    image = np.stack([rows, cols, 0 * rows], axis=-1).astype(np.uint8)
    multicrop = MultiCrop(
        global_crop_size_px=64, local_crop_size_px=32, num_local_crops=40, flip_probability=0.0
    )
    global_crops, local_crops = _cut(multicrop, image)
    for crops, (low, high) in ((global_crops, (0.32, 1.0)), (local_crops, (0.05, 0.32))):
        extent = [np.ptp(crops[..., i].astype(float), axis=(1, 2)) for i in (0, 1)]
        share = extent[0] * extent[1] / (height * width)
        assert (share > 0.75 * low).all() and (share < 1.1 * high).all()
    assert np.ptp(local_crops[:, 0, 0, 0]) > 60  # they lie all over the image


def test_flips():
    image = make_image(0, height=60, width=60)
    never = _cut(MultiCrop(flip_probability=0.0, num_local_crops=60), image)
    always = _cut(MultiCrop(flip_probability=1.0, num_local_crops=60), image)
    half = _cut(MultiCrop(flip_probability=0.5, num_local_crops=60), image)
    for a, b, c in zip(never, always, half, strict=True):
        np.testing.assert_array_equal(a, b[:, :, ::-1])
        is_either = (a == c).all(axis=(1, 2, 3)) | (b == c).all(axis=(1, 2, 3))
        assert is_either.all()
    flipped = (half[1] == always[1]).all(axis=(1, 2, 3))
    assert 15 <= flipped.sum() <= 45
    assert ((half[1] == never[1]).all(axis=(1, 2, 3)) ^ flipped).all()


def test_random_numbers_do_not_depend_on_the_image():
    multicrop = MultiCrop(num_local_crops=3)
    states = []
    for image in (make_image(0, height=4, width=300), make_image(1, height=80, width=90)):
        rng = np.random.default_rng(0)
        multicrop(
            image,
            rng,
            global_crops=np.zeros((2, 16, 16, 3), np.uint8),
            local_crops=np.zeros((3, 8, 8, 3), np.uint8),
        )
        states.append(rng.random())
    assert states[0] == states[1]


@pytest.mark.parametrize("num_local_crops", [0, 1, 8])
def test_number_of_local_crops(num_local_crops):
    multicrop = MultiCrop(num_local_crops=num_local_crops)
    global_crops, local_crops = _cut(multicrop, make_image(0))
    assert len(local_crops) == num_local_crops
    assert global_crops.std(axis=(1, 2, 3)).min() > 0
    augmentation = multicrop.draw_augmentation(np.random.default_rng(0))
    assert augmentation.shape == (2 + num_local_crops, len(AUGMENT_COLUMNS))
    assert augmentation.dtype == np.float32


def _columns(multicrop, num=3000):
    rng = np.random.default_rng(0)
    drawn = np.stack([multicrop.draw_augmentation(rng) for _ in range(num)])
    return dict(zip(AUGMENT_COLUMNS, np.moveaxis(drawn, -1, 0), strict=True))  # each [num, g + l]


@pytest.mark.parametrize(
    "mode, blur", [("as_released", (0.0, 0.9, 0.5)), ("as_intended", (1.0, 0.1, 0.5))]
)
def test_probabilities(mode, blur):
    columns = _columns(MultiCrop(mode=mode, num_local_crops=2))
    expected = {
        "jitter": (0.8,) * 4,
        "grayscale": (0.2,) * 4,
        "solarize": (0.0, 0.2, 0.0, 0.0),
    }
    for name, probabilities in expected.items():
        assert set(np.unique(columns[name])) <= {0.0, 1.0}
        np.testing.assert_allclose(columns[name].mean(axis=0), probabilities, atol=0.03)
    is_blurred = columns["blur_sigma"] > 0
    np.testing.assert_allclose(is_blurred.mean(axis=0), (*blur, blur[2]), atol=0.03)
    for name, p in (("solarize", 0.0), ("blur", blur[0])):
        drawn = is_blurred if name == "blur" else columns[name]
        if p in (0.0, 1.0):  # exactly never, exactly always
            assert (drawn[:, 0] == p).all()


@pytest.mark.parametrize(
    "name, low, high",
    [
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
        ("blur_sigma", 0.1, 2.0),
        ("jitter_order", 0, 23),
    ],
)
def test_strengths_are_uniform(name, low, high):
    values = _columns(MultiCrop(num_local_crops=1))[name][:, 1:].ravel()
    if name == "blur_sigma":
        values = values[values > 0]
    assert values.min() >= np.float32(low) and values.max() <= np.float32(high)
    quantiles = np.linspace(0, 1, 11)
    expected = low + (high - low) * quantiles
    assert np.abs(np.quantile(values, quantiles) - expected).max() < 0.04 * (high - low) + (
        0.5 if name == "jitter_order" else 0
    )
    if name == "jitter_order":
        assert set(np.unique(values)) == set(range(24))


def test_parameters_are_independent():
    columns = _columns(MultiCrop(num_local_crops=1, mode="as_intended"))
    names = [n for n in AUGMENT_COLUMNS]
    values = np.stack([columns[name][:, 2] for name in names if columns[name][:, 2].std() > 0])
    correlation = np.corrcoef(values) - np.eye(len(values))
    assert np.abs(correlation).max() < 0.08


def test_blur_probability_overrides_the_mode():
    columns = _columns(MultiCrop(num_local_crops=1, blur_probability=(1.0, 0.0, 0.0)), num=50)
    assert (columns["blur_sigma"][:, 0] > 0).all()
    assert (columns["blur_sigma"][:, 1:] == 0).all()


def test_factors_do_not_turn_negative():
    brightness = _columns(MultiCrop(brightness=1.5), num=300)["brightness"]
    assert 0 <= brightness.min() < 0.1 and 2.3 < brightness.max() <= 2.5


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"mode": "released"}, "must be one of .*as_intended.*as_released"),
        ({"blur_probability": (0.5,)}, "must hold 3 numbers"),
        ({"solarize_probability": ()}, "must hold 3 numbers"),
        ({"local_crop_scale": (0.5, 0.1)}, "low <= high"),
        ({"aspect_ratio": (0.0, 1.0)}, "0 < low"),
        ({"num_local_crops": -1}, "must not be negative"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        MultiCrop(**settings)


def test_a_single_random_resized_crop():
    image = make_image(0, height=80, width=60)
    crop = random_resized_crop(image, np.random.default_rng(3), size_px=24, scale=(0.2, 0.4))
    draws = np.random.default_rng(3).random((10, 4)).tolist()
    box = crop_box(80, 60, draws, scale=(0.2, 0.4), aspect_ratio=RATIO)
    np.testing.assert_array_equal(crop, resize_box(to_pillow(image), box, 24, 24))
