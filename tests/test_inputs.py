"""From a configuration to what reads images."""

import types

import jax
import numpy as np
import pytest
from PIL import Image

from dinov2_jax import inputs
from dinov2_jax.config import load_config
from dinov2_jax.data.records import DataError
from dinov2_jax.distributed import HostError
from dinov2_jax.sharding import make_mesh
from tests.small_run import QUICKSTART, SHRINK


def load(**overrides):
    keys = SHRINK | {key.replace("__", "."): str(value) for key, value in overrides.items()}
    return load_config(QUICKSTART, [(key, str(value)) for key, value in keys.items()])


@pytest.mark.parametrize(
    ("name", "path", "expected"),
    [
        ("mine", "/data/val.tar", "mine"),
        ("", "/data/my val.tar", "my_val_tar"),
        ("", "shards/{000..127}.tar", "000_127_tar"),
        ("", "photos:", "photos"),
    ],
)
def test_an_evaluation_is_named_after_its_queries(name, path, expected):
    config = load(eval__name=name, eval__query_path=path)
    assert inputs.evaluation_name(config) == expected


def test_errors_of_a_source_name_their_key(tmp_path):
    with pytest.raises(DataError, match=r"^data\.path: "):
        inputs.open_data(load(data__path=tmp_path / "missing"))
    with pytest.raises(DataError, match=r"^data\.mixture: "):
        inputs.open_data(load(data__path="", data__mixture=f"(('{tmp_path}/no', 1.0),)"))


def test_batches_have_the_sizes_of_the_configuration():
    config = load(global_batch_size=8, group_size=2)
    mesh = make_mesh(data=4, devices=jax.devices()[:4])
    with inputs.open_batches(config, inputs.open_data(config), mesh, start_step=3) as batches:
        batch = next(batches)
    assert batch.global_crops.shape == (8, 2, 16, 16, 3)
    assert batch.local_crops.shape == (8, 2, 8, 8, 3)
    assert batch.masks.shape == (4, 4, 4)
    np.testing.assert_array_equal(batch.index, 3 * 8 + np.arange(8))


def test_a_bad_image_is_explained_by_what_decoding_says(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (20, 20)).save(folder / "good.png")
    whole = (folder / "good.png").read_bytes()
    (folder / "half.png").write_bytes(whole[:45])
    config = load(data__path=folder, data__max_bad_fraction=1.0)
    source = inputs.open_data(config)
    bad = inputs.build_bad_images(config, source, tmp_path, is_writer=True)
    bad.add(np.array([-1, 0, 1]))  # as if both could not be read
    good, half = (tmp_path / "bad_images.txt").read_text().splitlines()
    assert good.endswith("good.png\tcould not be read once, and could later")
    assert half.split("\t")[0].endswith("half.png") and "could later" not in half


def test_there_may_be_no_evaluation():
    assert inputs.evaluate_with_baselines(None) is None
    assert inputs.build_evaluation(load(eval__kind="none"), trainer=None) is None


def test_nothing_is_drawn_of_photos_that_another_host_cannot_read(tmp_path, monkeypatch):
    """Said before the first computation, which all hosts must take part in."""

    def differ(what, text):
        assert text.count("\n") == 11 and "\n\n" not in text  # the names of twelve photos
        raise HostError(f"another {what}")

    monkeypatch.setattr(inputs, "check_same", differ)
    trainer = types.SimpleNamespace(mesh=make_mesh())
    config = load()
    with pytest.raises(HostError, match="another set of photos to draw"):
        inputs.draw_patches(config, trainer, inputs.open_data(config), None, tmp_path / "pca.png")
