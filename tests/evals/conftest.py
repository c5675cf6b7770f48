"""A tiny network in memory and as a file, and labelled folders of images of three colours."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov2_jax.convert import write_model
from dinov2_jax.model import Model, load
from tests.convert.models import make_params, make_spec
from tests.evals.stand_ins import COLORS

NUM_IMAGES = {"train": 8, "val": 4, "test": 4}  # of each class


@pytest.fixture(scope="session")
def model_path(tmp_path_factory) -> pathlib.Path:
    """A file of a network of width 16: three blocks, four registers, images of 12 px."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    spec = make_spec("registers", depth=3)
    write_model(path, spec, make_params(spec), format="safetensors")
    return path


@pytest.fixture(scope="session")
def model(model_path) -> Model:
    return load(model_path)


@pytest.fixture(scope="session")
def colors(tmp_path_factory) -> pathlib.Path:
    """train/, val/ and test/ with folders red, green and blue of small PNG files."""
    folder = tmp_path_factory.mktemp("colors")
    for split, count in NUM_IMAGES.items():
        write_images(folder / split, count=count, seed=len(split))
    return folder


@pytest.fixture
def arguments(cache, model_path, colors, tmp_path) -> list[str]:
    """Of a task on these images; its results go to `tmp_path / "out"`, see `read`."""
    return ["--model", str(model_path), "--data", str(colors), "--out", str(tmp_path / "out")]


def read(tmp_path: pathlib.Path) -> dict[str, Any]:
    """The record that a task has written."""
    return json.loads((tmp_path / "out" / "result.json").read_text())


def write_images(folder: pathlib.Path, *, count: int, seed: int, classes=tuple(COLORS)) -> None:
    """Noisy images of each class, `folder/CLASS/NUMBER.png`; the colours are told apart easily."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = rng.normal(COLORS[name], 30, (20, 18, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / name / f"{i}.png")
