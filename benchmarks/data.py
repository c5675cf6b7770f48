"""Images per second and core of the host's work, beside augmentation done on the host.

Three ways to the crops of one image (2 x 224 px, 8 x 98 px), in turns in one thread:

    ours         decode, crop, flip to uint8; colours are left to the device
    host         the same decoder and crops, then all colour operations in Pillow, and to float
    host+pillow  as host, decoded by Pillow as in the reference

    python benchmarks/data.py [FOLDER]     default: the photographs of the quickstart, as JPEG

Why not more than 2.3 to 2.5 times at 500 px: README, "How data flows".
"""

import argparse
import io
import itertools
import os
import statistics
import tempfile
import time

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dinov2_jax.data.batch import AUGMENT_COLUMNS
from dinov2_jax.data.image_ops import decode
from dinov2_jax.data.multicrop import MultiCrop
from dinov2_jax.data.sources import open_source

MULTICROP = MultiCrop()
MEAN = np.array((0.485, 0.456, 0.406), np.float32)
STD = np.array((0.229, 0.224, 0.225), np.float32)
JITTER_ORDERS = tuple(itertools.permutations(("brightness", "contrast", "saturation", "hue")))
ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


def cut_crops(image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Our host work after decoding: ten uint8 crops."""
    sizes = (MULTICROP.global_crop_size_px, MULTICROP.local_crop_size_px)
    global_crops = np.empty((2, sizes[0], sizes[0], 3), np.uint8)
    local_crops = np.empty((MULTICROP.num_local_crops, sizes[1], sizes[1], 3), np.uint8)
    MULTICROP(image, rng, global_crops=global_crops, local_crops=local_crops)
    return [*global_crops, *local_crops]


def augment_on_host(crop: np.ndarray, parameters: dict[str, float]) -> np.ndarray:
    """All colour operations as torchvision does them to Pillow images; float32 [h, w, c]."""
    image = Image.fromarray(crop)
    if parameters["jitter"]:
        for name in JITTER_ORDERS[int(parameters["jitter_order"])]:
            if name == "hue":
                image = shift_hue(image, parameters["hue"])
            else:
                image = ENHANCERS[name](image).enhance(parameters[name])
    if parameters["grayscale"]:
        image = Image.merge("RGB", [image.convert("L")] * 3)
    if parameters["blur_sigma"]:
        image = image.filter(ImageFilter.GaussianBlur(parameters["blur_sigma"]))
    if parameters["solarize"]:
        image = ImageOps.solarize(image, 128)
    return (np.asarray(image, np.float32) / 255 - MEAN) / STD


def shift_hue(image: Image.Image, turns: float) -> Image.Image:
    """Adds to the hue channel, modulo 256."""
    hue, saturation, value = image.convert("HSV").split()
    shifted = np.asarray(hue) + np.uint8(int(turns * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert("RGB")


def ours(content: bytes, rng: np.random.Generator) -> None:
    MULTICROP.draw_augmentation(rng)
    cut_crops(decode(content), rng)


def host(content: bytes, rng: np.random.Generator) -> None:
    augment_all(decode(content), rng)


def host_pillow(content: bytes, rng: np.random.Generator) -> None:
    augment_all(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")), rng)


def augment_all(image: np.ndarray, rng: np.random.Generator) -> None:
    drawn = MULTICROP.draw_augmentation(rng)
    for crop, row in zip(cut_crops(image, rng), drawn, strict=True):
        augment_on_host(crop, dict(zip(AUGMENT_COLUMNS, row.tolist(), strict=True)))


def write_photos(folder: str, long_side: int) -> None:
    """The quickstart's photographs as JPEG files of a usual size (ImageNet's: 500 x 375 px)."""
    source = open_source("photos:")
    for i in range(len(source)):
        image = Image.fromarray(decode(source[i].image))
        scale = min(1.0, long_side / max(image.size))
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
        name = source.name(i).rpartition(".")[0]
        image.save(os.path.join(folder, f"{name}.jpg"), quality=90)


def measure(folder: str, num_rounds: int) -> None:
    """Prints the medians over rounds; in each round every way reads every image once."""
    source = open_source(folder)
    print(source.describe())
    contents = [source[i].image for i in range(len(source))]
    pixels = statistics.mean(np.prod(decode(content).shape[:2]) for content in contents)
    ways = {"ours": ours, "host": host, "host+pillow": host_pillow}
    rates = {name: [] for name in ways}
    for round_number in range(num_rounds + 1):
        for name, way in ways.items():
            started = time.process_time()
            for i, content in enumerate(contents):
                way(content, np.random.default_rng([round_number, i]))
            rates[name].append(len(contents) / (time.process_time() - started))
    print(f"mean image {pixels / 1e6:.2f} million pixels; {num_rounds} rounds after a warm-up")
    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rates["ours"][1:], values[1:], strict=True))
        print(
            f"{name:12} {medians[name]:6.1f} images/s/core "
            f"({min(values[1:]):.1f} to {max(values[1:]):.1f}); ours is {ratio:.2f} times that"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", nargs="?", default="", help="of photographs")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if not options.folder:
            write_photos(temporary, long_side=500)
        measure(options.folder or temporary, options.rounds)


if __name__ == "__main__":
    main()
