"""Sources and networks whose answers are known, for tests of in-run evaluation."""

import io

import jax
import numpy as np
from PIL import Image

from dinov2_jax.data.records import Record, Source
from dinov2_jax.models.vit import BackboneOutput

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
NORMAL = dict(mean=MEAN, std=STD)


class ListSource(Source):
    """Records in memory. An image that is an exception is raised on reading."""

    def __init__(self, images, names, labels=None, label_names=()):
        self.path, self.kind, self.rejected = "list", "memory", []
        self.label_names = tuple(label_names)
        labels = [None] * len(images) if labels is None else labels
        self.records = [Record(*record) for record in zip(images, names, labels, strict=True)]
        self.num_reads = 0

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        self.num_reads += 1
        if isinstance(self.records[index].image, Exception):
            raise self.records[index].image
        return self.records[index]

    def name(self, index):
        return self.records[index].name


def color_apply(params, images):
    """Features that are right by construction: CLS the mean colour, patches its opposite."""
    color = params * images.mean(axis=(1, 2))
    return BackboneOutput(cls=color, registers=color[:, None][:, :0], patches=-color[:, None])


def noise_apply(params, images):
    """Features that say nothing: CLS depends on one hashed pixel."""
    value = np.float32(1e4) * (images[:, 0, 0, :1] + 3 * images[:, -1, -1, :1]) + params
    noise = jax.numpy.sin(value * jax.numpy.arange(1, 5, dtype=np.float32))
    return BackboneOutput(cls=noise, registers=noise[:, None][:, :0], patches=noise[:, None])


COLORS = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200)}


def colored_source(num: int, *, classes=("red", "green", "blue"), seed: int = 0) -> ListSource:
    """Noisy images of three colours, arrays and PNG files of several sizes."""
    rng = np.random.default_rng(seed)
    images, names, labels = [], [], []
    for i in range(num):
        label = i % len(classes)
        size = rng.integers(20, 40, 2)
        image = rng.normal(COLORS[classes[label]], 30, (*size, 3)).clip(0, 255).astype(np.uint8)
        if i % 2:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            image = file.getvalue()
        images.append(image)
        names.append(f"{classes[label]}/{seed}_{i}.png")
        labels.append(label)
    return ListSource(images, names, labels, classes)
