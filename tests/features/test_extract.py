"""`extract` as a whole: the model's own numbers, however the work is divided and interrupted."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

from dinov2_jax.data.pack import pack
from dinov2_jax.data.sources import open_source
from dinov2_jax.features import extract, read
from tests.data.conftest import encode, make_image
from tests.features.conftest import BAD, NUM_IMAGES

WHAT = "cls,mean,patches,registers,layers=0+2"
SETTINGS = dict(what=WHAT, shard_size=6, per_device_batch_size=1, max_bad_fraction=0.1, quiet=True)
GOOD = [i for i in range(NUM_IMAGES) if i not in BAD]
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def whole(cache, model, photos, tmp_path_factory) -> pathlib.Path:
    """An uninterrupted run on the eight devices."""
    out = tmp_path_factory.mktemp("whole") / "out"
    report = extract(model, str(photos), out, **SETTINGS)
    assert report.is_complete and report.images == NUM_IMAGES
    assert sorted(pathlib.Path(name).name for name, _ in report.bad) == ["03.jpg", "11.jpg"]
    assert report.images_per_sec > 0 and 0 <= report.data_wait_share <= 1
    return out


def contents(out: pathlib.Path) -> dict[str, bytes]:
    """All that counts of a folder."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name[0] != ".")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def assert_close(found, expected):
    for name, array in found.arrays.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_numbers_are_the_models_and_rows_the_sources(whole, model, photos):
    found = read(whole)
    source = open_source(str(photos))
    names = [source.name(i) for i in range(NUM_IMAGES)]
    good = [i for i, name in enumerate(names) if int(name[-6:-4]) in GOOD]
    assert found.ids.tolist() == good
    assert found.paths == [names[i] for i in good]
    assert [found.label_names[i] for i in found.labels] == [
        pathlib.Path(path).parent.name for path in found.paths
    ]
    images = model.preprocess(found.paths)
    out, layers = model(images), model.intermediate_layers(images, [0, 2])
    expected = {
        "cls": out.cls,
        "mean": out.patches.mean(axis=1),
        "patches": out.patches,
        "registers": out.registers,
        "layers_cls": np.stack([x.cls for x in layers], axis=1),
        "layers_mean": np.stack([x.patches.mean(axis=1) for x in layers], axis=1),
    }
    assert found.arrays.keys() == expected.keys()
    assert_close(found, expected)
    named = (whole / "bad_images.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in named] == [
        names[i] for i in sorted({*range(20)} - {*good})
    ]
    assert found.index["rows"] == [6, 5, 5, 2] and found.index["bad_images"] == 2
    assert found.index["model"]["num_register_tokens"] == 4


def test_one_device_is_eight(whole, model, photos, tmp_path, monkeypatch):
    one = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: one)
    extract(model, photos, tmp_path / "out", **SETTINGS | {"per_device_batch_size": 3})
    assert_close(read(tmp_path / "out"), read(whole))


def test_processes_divide_the_work_and_nothing_else(whole, model, photos, tmp_path):
    out = tmp_path / "out"
    for i in (1, 0):
        report = extract(model, str(photos), out, **SETTINGS, process_index=i, process_count=2)
        assert report.is_complete == (i == 0)
    assert contents(out) == contents(whole)


def test_lost_shards_are_made_again_bit_for_bit(whole, model, photos, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "shard-00002-of-00004")
    report = extract(model, str(photos), out, **SETTINGS)
    assert report.images == 6 and len(report.bad) == 1
    assert contents(out) == contents(whole)
    assert extract(model, str(photos), out, **SETTINGS).images == 0


@pytest.mark.parametrize("change", [{"what": "cls"}, {"crop_size_px": 16}, {"shard_size": 5}])
def test_another_option_is_refused(whole, model, photos, change):
    (name,) = change
    with pytest.raises(ValueError, match=rf"holds features made otherwise: .*{name}: "):
        extract(model, str(photos), whole, **SETTINGS | change)


def test_other_images_are_refused(whole, model, photos):
    with pytest.raises(ValueError, match=r"images: 20 -> 10; .*source.names_sha256: "):
        extract(model, str(photos / "class_0"), whole, **SETTINGS)
    renamed = open_source(str(photos))
    renamed.name = lambda index: f"another {index}"
    with pytest.raises(ValueError, match=r"otherwise: source\.names_sha256: [^;]*;[^;]*$"):
        extract(model, renamed, whole, **SETTINGS)


@pytest.mark.parametrize("kind", ["list", "tar", "array_record"])
def test_every_kind_of_source(whole, model, photos, tmp_path, kind):
    path = tmp_path / "x.txt"
    if kind == "list":
        path.write_text("".join(f"{name}\tclass\n" for name in sorted(photos.rglob("*.jpg"))))
    elif kind == "tar":
        path = shutil.make_archive(tmp_path / "x", "tar", photos)
    else:
        pack(open_source(str(photos)), tmp_path, num_shards=2)
        path = tmp_path / "*.array_record*"
    extract(model, str(path), tmp_path / "out", **SETTINGS)
    found, expected = read(tmp_path / "out"), read(whole)
    names = [[pathlib.Path(path).name for path in x.paths] for x in (found, expected)]
    order = [names[1].index(name) for name in names[0]]
    assert sorted(order) == list(range(len(GOOD)))
    np.testing.assert_allclose(found["cls"], expected["cls"][order], rtol=1e-4, atol=1e-4)


def test_too_many_bad_images_stop_it_and_a_higher_limit_goes_on(model, photos, tmp_path):
    out = tmp_path / "out"
    empty = tmp_path / "photos" / "class_0" / "empty.jpg"  # rejected at the scan: bad too
    shutil.copytree(photos, tmp_path / "photos")
    empty.touch()
    settings = SETTINGS | {"what": "cls"}
    with pytest.raises(
        ValueError, match=r"3 of 21 images cannot be read, more than max_bad_fraction=0.1 "
    ):
        extract(model, str(tmp_path / "photos"), out, **settings)
    assert len(list(out.glob("shard-*"))) == 3
    named = (out / "bad_images.txt").read_text().splitlines()
    assert named[0] == f"{empty}\tzero bytes" and len(named) == 3
    report = extract(model, str(tmp_path / "photos"), out, **settings | {"max_bad_fraction": 0.2})
    assert report.is_complete and report.images < NUM_IMAGES
    assert (out / "bad_images.txt").read_text().splitlines() == named
    with pytest.raises(
        ValueError, match="1 of 21 images cannot be read, more than max_bad_fraction=0 "
    ):
        extract(
            model, str(tmp_path / "photos"), tmp_path / "2", **settings | {"max_bad_fraction": 0}
        )


def test_whole_images_where_they_have_one_size(model, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(encode(make_image(i, height=20, width=30)))
    settings = dict(what="patches", crop=False, quiet=True, per_device_batch_size=1)
    extract(model, str(tmp_path), tmp_path / "out.npz", **settings)
    found = read(tmp_path / "out.npz")
    assert found.index["image_shape"] == [16, 28, 3] and found.index["crop_size_px"] is None
    expected = model(model.preprocess(found.paths, crop=False)).patches
    assert found["patches"].shape == (3, 4 * 7, 16)
    np.testing.assert_allclose(found["patches"], expected, rtol=1e-4, atol=1e-4)
    (tmp_path / "3.jpg").write_bytes(encode(make_image(3, height=30, width=20)))
    with pytest.raises(ValueError, match="all images must end up in one size"):
        extract(model, str(tmp_path), tmp_path / "other.npz", **settings)
    assert not (tmp_path / "other.npz").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_on_disk(whole, model, photos, tmp_path, dtype):
    exact = read(whole)
    for out in (tmp_path / "out", tmp_path / "out.safetensors"):
        extract(model, str(photos), out, **SETTINGS | {"what": "cls,layers=0+2", "dtype": dtype})
        found = read(out)
        for name, array in found.arrays.items():
            assert str(array.dtype) == dtype
            expected = np.asarray(exact[name]).astype(array.dtype).astype(np.float32)
            tolerance = 2.0 ** (-7 if dtype == "bfloat16" else -10)  # the last bit
            np.testing.assert_allclose(
                np.asarray(array, np.float32), expected, rtol=tolerance, atol=1e-4
            )


@pytest.mark.parametrize(
    ("out", "settings", "message"),
    [
        ("out", {"dtype": "float8"}, "dtype='float8' must be one of"),
        ("out", {"per_device_batch_size": 0}, "per_device_batch_size=0 must be at least 1"),
        ("out", {"shard_size": 0}, "shard_size=0 must be at least 1"),
        ("out", {"num_threads": -1}, "num_threads=-1 must be at least 1; leave it out"),
        ("out", {"resize_size_px": -5}, "resize_size_px=-5 must be at least 1"),
        ("out", {"process_index": 2, "process_count": 2}, "must lie between 0 and"),
        ("out.npz", {"process_index": 0, "process_count": 2}, "one file, which one process writes"),
        ("out.npy", {}, "must be a folder, or a file .npz or .safetensors"),
        ("gs://bucket/out", {}, "must be on a file system"),
        ("out", {"what": "all"}, "'all' must be one of"),
        ("out", {"resize_size_px": 10}, "crop_size_px=12 must not exceed resize_size_px=10"),
        ("out", {"crop_size_px": 14}, "height=14 and width=14 must be multiples"),
    ],
)
def test_wrong_arguments_leave_nothing(
    model, photos, tmp_path, monkeypatch, out, settings, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        extract(model, str(photos), out, **SETTINGS | settings)
    assert not list(tmp_path.iterdir())
