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


def test_all_hosts_have_the_evaluation_of_the_first(monkeypatch):
    """They decide by it which checkpoint to save, together."""
    monkeypatch.setattr(inputs, "of_primary", lambda values: {name: 0.25 for name in values})

    class Evaluation:
        name = "x"

        def __call__(self, params):
            return {"knn/x/cls": 0.5, "knn/x/mean_patch": 0.5}

        def baselines(self, params):
            return {"knn/x/random_init_cls": 0.5, "knn/x/random_init_mean_patch": 0.5}

    evaluate = inputs.evaluate_with_baselines(Evaluation())
    for step in (0, 1):
        values = evaluate({"backbone": None}, step)
        assert "knn/x/cls" in values and set(values.values()) == {0.25}


def test_what_one_process_draws_alone_runs_on_a_device_of_its_own(tmp_path, monkeypatch):
    """The run's mesh has devices of others: they would have to run the same."""
    computed = []

    def jit(function):
        def compute(*arrays):
            computed.append(jax.jit(function)(*arrays))
            return computed[-1]

        return compute

    monkeypatch.setattr("dinov2_jax.visualize.crops.jax", types.SimpleNamespace(jit=jit))
    config = load(global_batch_size=8, group_size=1)
    mesh = make_mesh()
    with (
        inputs.open_batches(config, inputs.open_data(config), mesh, start_step=0) as batches,
        jax.set_mesh(mesh),
    ):
        inputs.draw_crops(config, next(batches), tmp_path / "crops.png")
    assert (tmp_path / "crops.png").exists()
    assert [array.sharding.device_set for array in computed] == 2 * [{jax.local_devices()[0]}]


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
