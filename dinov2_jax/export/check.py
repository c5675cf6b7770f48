"""Whether an exported file computes what the model computes.

In: the file, as a function of images, and the model it was made of. Out: the largest difference
of each output, on images that look like photographs, in two batches of different sizes.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from dinov2_jax.model import Model

Run = Callable[[np.ndarray], dict[str, np.ndarray]]

# Of the largest value of an output. Sums in another order make 2e-6 after 12 blocks.
BOUND = 1e-4
BATCHES = (1, 3)


class ExportError(RuntimeError):
    """The exported file differs from the model."""


def check(run: Run, model: Model, *, height: int, width: int) -> dict[str, float]:
    """Compares an exported model with its source.

    Args:
      run: images `[b, height, width, c]` -> the file's outputs by name.
      model: the source.
      height, width: of the images, in pixels.

    Returns:
      Output -> the largest difference over the largest value, for `cls`, `patches` and, where
      the model has them, `registers`.

    Raises:
      ExportError: an output is missing, has another shape, or differs by more than `BOUND`.
    """
    differences = {}
    for batch in BATCHES:
        images = make_images(batch, height, width, mean=model.spec.mean, std=model.spec.std)
        expected = outputs_by_name(model(images))
        outputs = run(images)
        shapes, right_shapes = (
            {name: tuple(x.shape) for name, x in named.items()} for named in (outputs, expected)
        )
        if shapes != right_shapes:
            raise ExportError(f"the exported model's outputs are {shapes}, not {right_shapes}")
        for name, right in expected.items():
            right = np.asarray(right)
            difference = float(np.abs(np.asarray(outputs[name]) - right).max() / abs(right).max())
            differences[name] = float(np.maximum(differences.get(name, 0.0), difference))
    if not max(differences.values()) <= BOUND:  # NaN is not
        raise ExportError(
            f"the exported model differs from its source by {describe(differences)} of the "
            f"largest value, more than {BOUND:.0e}"
        )
    return differences


def describe(differences: dict[str, float]) -> str:
    """Differences in words."""
    return ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())


def outputs_by_name(output) -> dict:
    """The fields of a `BackboneOutput`; registers only where there are any."""
    named = dict(cls=output.cls, registers=output.registers, patches=output.patches)
    return {name: x for name, x in named.items() if x.size}


def make_images(
    batch: int, height: int, width: int, *, mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
    """Images with structure at every scale, as photographs have: `[batch, height, width, c]`.

    Each octave of noise is half as strong as the one below it; pixels are 8 bits, normalised.
    """
    rng = np.random.default_rng(batch)
    images = np.zeros((batch, height, width, len(mean)), np.float32)
    for octave in range(int(np.log2(min(height, width))) + 1):
        noise = rng.standard_normal((batch, len(mean), 2**octave, 2**octave), np.float32)
        for b, c in np.ndindex(batch, len(mean)):
            channel = Image.fromarray(noise[b, c]).resize((width, height), Image.Resampling.BICUBIC)
            images[b, ..., c] += 0.5**octave * np.asarray(channel)
    pixels = np.clip(128 + 50 * images, 0, 255).astype(np.uint8)
    return (pixels.astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)
