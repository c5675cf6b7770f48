"""A retrieval set from any folder of photos: queries are edited copies of them, made here.

    python benchmarks/edited_copies.py PHOTOS OUT [--same-colors]
    python -m dinov2_jax.evals retrieval --data OUT --model M --out RESULTS

Each query is one photo after a crop of 30 to 60 % of its area, a change of brightness, contrast and
colour, a turn from left to right of every second one, and JPEG of quality 30. Its positive is the
photo; all others are wrong.
"""

import argparse
import json
import pathlib

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

SEED = 0
AREA, ASPECT, STRENGTH, QUALITY = (0.3, 0.6), (3 / 4, 4 / 3), (0.6, 1.4), 30


def edited(
    photo: Image.Image,
    rng: np.random.Generator,
    *,
    strength: tuple[float, float],
    is_flipped: bool,
) -> Image.Image:
    """One copy."""
    area = rng.uniform(*AREA) * photo.width * photo.height
    ratio = np.exp(rng.uniform(*np.log(ASPECT)))
    width = min(round((area * ratio) ** 0.5), photo.width)
    height = min(round((area / ratio) ** 0.5), photo.height)
    left, top = rng.integers(0, [photo.width - width + 1, photo.height - height + 1])
    copy = photo.crop((left, top, left + width, top + height))
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        copy = change(copy).enhance(rng.uniform(*strength))
    return ImageOps.mirror(copy) if is_flipped else copy


def main() -> None:
    """Writes the copies and the list."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--same-colors", action="store_true", help="crops and turns alone")
    flags = parser.parse_args()
    strength = (1.0, 1.0) if flags.same_colors else STRENGTH
    rng = np.random.default_rng(SEED)
    names = sorted(x for x in flags.photos.resolve().iterdir() if x.suffix == ".jpg")
    flags.out.mkdir(parents=True, exist_ok=True)
    queries = []
    for i, name in enumerate(names):
        photo = Image.open(name).convert("RGB")
        copy = edited(photo, rng, strength=strength, is_flipped=bool(i % 2))
        copy.save(flags.out / f"{i:04d}.jpg", quality=QUALITY)
        queries.append({"image": f"{i:04d}.jpg", "positive": [str(name)]})
    content = {"database": [str(name) for name in names], "queries": queries}
    (flags.out / "list.json").write_text(json.dumps(content))
    print(f"{len(names)} photos and as many edited copies: {flags.out / 'list.json'}")


if __name__ == "__main__":
    main()
