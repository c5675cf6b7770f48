"""Each operation against Pillow or an explicit float64 formula; levels are 0 to 255."""

import functools
import itertools

import jax
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from dinov2_jax.augment import augment, normalize, shift_hue
from dinov2_jax.data.batch import AUGMENT_COLUMNS
from dinov2_jax.sharding import batch_sharding, make_mesh
from tests.reference.augment_oracle import grey_of, oracle

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPERATIONS = ("brightness", "contrast", "saturation", "hue")
OFF = dict(jitter=0, brightness=1, contrast=1, saturation=1, hue=0, jitter_order=0)
OFF |= dict(grayscale=0, blur_sigma=0, solarize=0)


def parameters(num: int = 1, **columns) -> np.ndarray:
    """Parameters `[num, columns]` that do nothing but what is named."""
    assert set(OFF) == set(AUGMENT_COLUMNS)
    values = OFF | columns
    rows = [np.broadcast_to(values[name], num) for name in AUGMENT_COLUMNS]
    return np.stack(rows, axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def crops() -> np.ndarray:
    """Smooth colours and noise, uint8 [4, 20, 28, 3]; greys, black and white among them."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (4, 5, 7, 3), np.uint8)
    smooth = [np.asarray(Image.fromarray(x).resize((28, 20), Image.BICUBIC)) for x in coarse]
    images = np.stack(smooth)
    images[1] = rng.integers(0, 256, images[1].shape)
    images[2, :3] = images[2, :3, :, :1]  # greys have no hue
    images[2, 3], images[2, 4] = 0, 255
    return images


@functools.cache
def compiled(channels: int, options: tuple):
    """`augment` to [0, 1], compiled once for every set of options."""
    fixed = dict(mean=(0,) * channels, std=(1,) * channels) | dict(options)
    return jax.jit(functools.partial(augment, **fixed))


def levels(crops: np.ndarray, params: np.ndarray, **options) -> np.ndarray:
    """`augment` with its normalisation undone: float64 levels."""
    run = compiled(crops.shape[-1], tuple(options.items()))
    return 255 * np.asarray(run(crops, params), np.float64)


@pytest.mark.parametrize(
    ("operation", "value"),
    [
        ("brightness", 0.6),
        ("brightness", 1.4),
        ("contrast", 0.6),
        ("contrast", 1.4),
        ("saturation", 0.8),
        ("saturation", 1.2),
        ("hue", 0.1),
        ("hue", -0.1),
        ("hue", 0.5),
    ],
)
def test_one_operation_is_its_formula(crops, operation, value):
    ours = levels(crops, parameters(4, jitter=1, **{operation: value}))
    expected = np.stack([oracle(x.astype(np.float64), operation, value) for x in crops])
    np.testing.assert_allclose(ours, expected, atol=2e-3)  # float32 at 255, hue divides


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.4])
@pytest.mark.parametrize(
    ("operation", "enhance"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_enhancements_are_pillows(crops, operation, enhance, factor):
    ours = levels(crops, parameters(4, jitter=1, **{operation: factor}))
    pillow = np.stack([enhance(Image.fromarray(x)).enhance(factor) for x in crops])
    # Pillow truncates to whole levels, after rounding the greyscale (by at most a half), whose
    # mean may then round to the next level.
    slack = {"brightness": 0, "contrast": 1, "saturation": 0.5}[operation] * abs(1 - factor)
    difference = ours - pillow
    assert difference.min() > -slack - 1e-3
    assert difference.max() < 1 + slack + 1e-3


@pytest.mark.parametrize("steps", [-25, -7, 12, 25])
def test_hue_is_pillows_up_to_its_eight_bits(crops, steps):
    ours = levels(crops, parameters(4, jitter=1, hue=steps / 255))

    def shifted(image):
        h, s, v = Image.fromarray(image).convert("HSV").split()
        h = Image.fromarray((np.asarray(h).astype(int) + steps).astype(np.uint8))
        return np.asarray(Image.merge("HSV", (h, s, v)).convert("RGB"))

    difference = np.abs(ours - np.stack([shifted(x) for x in crops]))
    # Pillow stores hue in 255 steps and wraps at 256: two steps are 12/255 of the chroma.
    assert difference.max() < 14
    assert difference.mean() < 2
    wrong_way = levels(crops, parameters(4, jitter=1, hue=-steps / 255))
    assert np.abs(wrong_way - ours).mean() > 4  # so the bound above tells right from wrong


def test_every_order_is_the_operations_in_that_order(crops):
    rng = np.random.default_rng(1)
    orders = list(itertools.permutations(OPERATIONS))
    images = crops[np.arange(24) % 4]
    values = {x: rng.uniform(0.6, 1.4, 24) for x in OPERATIONS[:3]}
    values["hue"] = rng.uniform(-0.1, 0.1, 24)
    values = {name: x.astype(np.float32) for name, x in values.items()}
    ours = levels(images, parameters(24, jitter=1, jitter_order=np.arange(24), **values))
    for i, order in enumerate(orders):
        expected = images[i].astype(np.float64)
        for operation in order:
            expected = oracle(expected, operation, values[operation][i])
        np.testing.assert_allclose(ours[i], expected, atol=5e-3, err_msg=str(order))
    # The orders do differ, or the comparison above would prove nothing.
    same = levels(crops[[0] * 24], parameters(24, jitter=1, jitter_order=np.arange(24), **{
        "brightness": 1.4, "contrast": 0.6, "saturation": 1.2, "hue": 0.1
    }))  # fmt: skip
    distinct = {x.round(1).tobytes() for x in same}
    assert len(distinct) > 12


def test_jitter_that_is_off_ignores_its_factors(crops):
    off = parameters(4, brightness=0.6, contrast=1.3, saturation=0.8, hue=0.1, jitter_order=13)
    np.testing.assert_array_equal(levels(crops, off), levels(crops, parameters(4)))


def test_contrast_mean_is_rounded_to_a_level():
    crops = np.zeros((1, 8, 8, 3), np.uint8)
    crops[0, :4] = 201  # mean 100.5: Pillow mixes with 101
    ours = levels(crops, parameters(jitter=1, contrast=0.0))
    np.testing.assert_allclose(ours, 101, rtol=1e-6)


def test_greyscale_is_pillows(crops):
    ours = levels(crops, parameters(4, grayscale=1))
    pillow = np.stack([Image.fromarray(x).convert("L") for x in crops])
    assert np.abs(ours - pillow[..., None]).max() < 0.51  # Pillow rounds
    np.testing.assert_allclose(ours, grey_of(crops)[..., None].repeat(3, -1), atol=1e-4)


@pytest.mark.parametrize(("sigma", "kernel"), [(0.1, 9), (0.7, 9), (2.0, 9), (2.0, 3), (1.0, 23)])
def test_blur_is_a_reflected_gaussian(crops, sigma, kernel):
    ours = levels(crops, parameters(4, blur_sigma=sigma), blur_kernel_size_px=kernel)
    offsets = np.arange(kernel) - kernel // 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    padded = np.pad(
        crops.astype(np.float64),
        ((0, 0), (kernel // 2,) * 2, (kernel // 2,) * 2, (0, 0)),
        "reflect",
    )
    _, height, width, _ = crops.shape
    expected = np.zeros(crops.shape)
    for i, wi in enumerate(weights):
        for j, wj in enumerate(weights):
            expected += wi * wj * padded[:, i : i + height, j : j + width]
    np.testing.assert_allclose(ours, expected, atol=2e-4)


def test_blur_takes_each_images_own_sigma(crops):
    sigmas = np.array([0.0, 0.5, 1.0, 2.0], np.float32)
    together = levels(crops, parameters(4, blur_sigma=sigmas))
    for i, sigma in enumerate(sigmas):
        alone = levels(crops, parameters(4, blur_sigma=sigma))
        np.testing.assert_allclose(together[i], alone[i], atol=1e-4)
    np.testing.assert_allclose(together[0], crops[0], atol=1e-4)


@pytest.mark.parametrize("threshold", [128, 0, 255])
def test_solarize_is_pillows_at_every_level(threshold):
    crops = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    ours = levels(crops, parameters(solarize=1), solarize_threshold=threshold)
    pillow = np.asarray(ImageOps.solarize(Image.fromarray(crops[0]), threshold))
    np.testing.assert_allclose(ours[0], pillow, atol=1e-4)


def test_the_stages_follow_each_other_as_in_the_reference(crops):
    """jitter, greyscale, blur, solarize: every later one sees what the earlier one made."""
    params = dict(jitter=1, brightness=1.3, grayscale=1, blur_sigma=1.5, solarize=1)
    ours = levels(crops, parameters(4, **params))
    stage = crops.astype(np.float64)
    for name in ("brightness", "grayscale", "blur_sigma", "solarize"):
        # Eight-bit steps in between, as the reference takes them; the last level is lost.
        step = {"jitter": 1, name: params[name]}
        stage = levels(np.clip(stage.round(), 0, 255).astype(np.uint8), parameters(4, **step))
    close = np.abs(ours - stage) < 2.5
    near_threshold = np.abs(ours - 127.5) < 3  # rounding decides on which side a pixel falls
    assert (close | near_threshold).all()
    assert close.mean() > 0.9


def test_normalize_is_its_formula(crops):
    expected = (crops / 255 - np.array(MEAN)) / np.array(STD)
    ours = jax.jit(lambda x: normalize(x, mean=MEAN, std=STD))(crops)
    np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("jitter", [0, 1])
def test_neutral_parameters_give_exactly_the_normalised_crops(crops, jitter):
    run = jax.jit(lambda x, p: augment(x, p, mean=MEAN, std=STD))
    plain = jax.jit(lambda x: normalize(x, mean=MEAN, std=STD))
    for order in range(24):
        ours = run(crops, parameters(4, jitter=jitter, jitter_order=order))
        np.testing.assert_array_equal(ours, plain(crops))


def mixed_parameters(num: int) -> np.ndarray:
    rng = np.random.default_rng(2)
    columns = {name: rng.uniform(0.6, 1.4, num) for name in OPERATIONS[:3]}
    columns |= {name: rng.random(num) < 0.5 for name in ("jitter", "grayscale", "solarize")}
    columns |= dict(hue=rng.uniform(-0.1, 0.1, num), jitter_order=rng.integers(0, 24, num))
    return parameters(num, blur_sigma=rng.uniform(0, 2, num), **columns)


def test_samples_do_not_touch_each_other(crops):
    images, params = np.concatenate([crops, crops]), mixed_parameters(8)
    together = levels(images, params)
    order = np.array([3, 1, 4, 0, 5, 7, 2, 6])
    np.testing.assert_allclose(levels(images[order], params[order]), together[order], atol=1e-3)


def test_eight_devices_agree_with_one(crops):
    images, params = np.concatenate([crops, crops]), mixed_parameters(8)
    sharding = batch_sharding(make_mesh(data=4, fsdp=2))
    sharded = levels(jax.device_put(images, sharding), jax.device_put(params, sharding))
    np.testing.assert_allclose(sharded, levels(images, params), atol=1e-3)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channel_counts_have_no_colour_operations(crops, channels):
    images = np.concatenate([crops, crops], axis=-1)[..., :channels]
    colourful = parameters(4, jitter=1, saturation=0.2, hue=0.3, grayscale=1)
    np.testing.assert_array_equal(levels(images, colourful), levels(images, parameters(4)))
    dark = levels(images, parameters(4, jitter=1, brightness=0.5))
    np.testing.assert_allclose(dark, images / 2, atol=1e-4)
    flat = levels(images, parameters(4, jitter=1, contrast=0.0))
    means = np.floor(images.mean(axis=(1, 2, 3)) + 0.5)
    np.testing.assert_allclose(flat, np.broadcast_to(means[:, None, None, None], flat.shape))


def test_no_crops_at_all_is_fine():
    empty = augment(np.zeros((0, 16, 16, 3), np.uint8), parameters(4)[:0], mean=MEAN, std=STD)
    assert empty.shape == (0, 16, 16, 3)


def test_hue_turns_red_to_green():
    red = [np.full((1, 2, 2), level, np.float32) for level in (200, 50, 50)]
    third = shift_hue(red, np.array([1 / 3], np.float32))
    np.testing.assert_allclose([x[0, 0, 0] for x in third], [50, 200, 50], atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(blur_kernel_size_px=8), "blur_kernel_size_px=8 must be odd and at most 39"),
        (dict(blur_kernel_size_px=41), "blur_kernel_size_px=41 must be odd and at most 39"),
        (dict(mean=(0.5,)), "one entry for each of 3 channels"),
        (dict(params=np.zeros((4, 3), np.float32)), r"params.shape=\(4, 3\) must be \(4, 9\)"),
    ],
)
def test_errors_name_value_and_rule(crops, change, message):
    arguments = dict(params=parameters(4), mean=MEAN, std=STD) | change
    with pytest.raises(ValueError, match=message):
        augment(crops, **arguments)
