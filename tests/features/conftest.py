"""A tiny network, in memory and as a file, and a folder of photographs with two bad ones."""

import pathlib

import pytest

from dinov2_jax.convert import write_model
from dinov2_jax.model import Model, load
from tests.convert.models import make_params, make_spec
from tests.data.conftest import encode, make_image

NUM_IMAGES, BAD = 20, (3, 11)


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
def photos(tmp_path_factory) -> pathlib.Path:
    """`NUM_IMAGES` JPEG files in two class folders, of which those numbered `BAD` are cut off."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(NUM_IMAGES):
        path = folder / f"class_{i % 2}" / f"{i:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        content = encode(make_image(i, height=20 + i, width=40 - i))
        path.write_bytes(content[: len(content) // 2 if i in BAD else None])
    return folder
