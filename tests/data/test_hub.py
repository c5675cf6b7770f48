"""Hugging Face and TFDS sources on stand-ins for the two packages, which are optional."""

import pickle
import sys
import types

import numpy as np
import pytest

from dinov2_jax.data.image_ops import decode
from dinov2_jax.data.records import BadImage, DataError
from dinov2_jax.data.sources import open_source
from dinov2_jax.faults import PassingFault
from tests.data.conftest import encode, make_image

IMAGES = [encode(make_image(i)) for i in range(3)]


class Image:
    def __init__(self, decode=True):
        self.decode = decode


class ClassLabel:
    names = ("cat", "dog")


class Rows:
    """A data set of `datasets` with three columns."""

    def __init__(self, features, rows):
        self.features, self._rows = features, rows

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        row = {name: self._rows[index][name] for name in self.features}
        if any(isinstance(f, Image) and f.decode for f in self.features.values()):
            raise AssertionError("the package would decode the image")
        return row

    def cast_column(self, name, feature):
        return Rows(self.features | {name: feature}, self._rows)

    def select_columns(self, names):
        return Rows({name: self.features[name] for name in names}, self._rows)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Installs a stand-in for `datasets`; returns the arguments it was called with."""
    (tmp_path / "on_disk.jpg").write_bytes(IMAGES[1])
    rows = [
        {"caption": "a", "picture": {"bytes": IMAGES[0], "path": None}, "label": 1},
        {
            "caption": "b",
            "picture": {"bytes": None, "path": str(tmp_path / "on_disk.jpg")},
            "label": 0,
        },
        {"caption": "c", "picture": {"bytes": None, "path": "gone.jpg"}, "label": 0},
    ]
    calls = []

    def load_dataset(name, config=None, *, split):
        calls.append((name, config, split))
        return Rows({"caption": str, "picture": Image(), "label": ClassLabel()}, rows)

    def load_from_disk(path):
        calls.append(path)
        return {"train": Rows({"picture": Image()}, rows[:1])}

    module = types.SimpleNamespace(
        Image=Image, ClassLabel=ClassLabel, load_dataset=load_dataset, load_from_disk=load_from_disk
    )
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


@pytest.mark.parametrize(
    "path, call",
    [
        ("hf:cifar10:train", ("cifar10", None, "train")),
        ("hf:owner/name:test", ("owner/name", None, "test")),
        ("hf:owner/name/config:train", ("owner/name", "config", "train")),
    ],
)
def test_hugging_face_paths(asked, path, call):
    source = open_source(path)
    assert asked == [call]
    assert source.label_names == ("cat", "dog") and len(source) == 3
    assert [source[i].image for i in range(2)] == IMAGES[:2]
    assert [source[i].label for i in range(2)] == [1, 0]
    assert source[1].name == source.name(1) == f"{path}[1]"
    with pytest.raises(BadImage):
        source[2]
    pickle.dumps(source)


def test_hugging_face_data_on_disk(asked, tmp_path):
    source = open_source(f"hf:{tmp_path}:train")
    assert asked == [str(tmp_path)]
    assert source.label_names == () and source[0].label is None


def test_hugging_face_errors(asked, monkeypatch):
    with pytest.raises(DataError, match="must name a split"):
        open_source("hf:cifar10")
    monkeypatch.setattr(
        sys.modules["datasets"], "load_dataset", lambda *_, split: Rows({"text": str}, [])
    )
    with pytest.raises(DataError, match=r"no image column, only \['text'\]"):
        open_source("hf:imdb:train")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionError("no\nnetwork"), PassingFault),
        (FileNotFoundError("no\nsuch data set"), DataError),
    ],
)
def test_a_hub_that_is_not_reached_may_be_later_and_a_missing_data_set_not(
    asked, monkeypatch, error, kind
):
    def load_dataset(*_, split):
        raise error

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", load_dataset)
    text = str(error).replace("\n", " ")
    with pytest.raises(kind, match=f"hf:imdb:train cannot be opened: {text}"):
        open_source("hf:imdb:train")


@pytest.mark.parametrize(
    "path, package", [("hf:cifar10:train", "datasets"), ("tfds:mnist:train", "tensorflow_datasets")]
)
def test_a_missing_package_names_the_pip_line(path, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"needs the package {package}: pip install .*data"):
        open_source(path)


@pytest.mark.parametrize(
    "path, name, split",
    [
        ("tfds:mnist:train", "mnist", "train"),
        ("tfds:coco/2017:train[:10%]", "coco/2017", "train[:10%]"),
        ("tfds:imagenet2012:5.1.0:validation", "imagenet2012:5.1.0", "validation"),
    ],
)
def test_tfds_paths(path, name, split, monkeypatch):
    calls = []
    features = {"image": Image(), "label": ClassLabel(), "id": str}
    rows = [{"image": IMAGES[0], "label": np.int64(1)}, {"image": make_image(1), "label": 0}]

    def data_source(name, *, split, decoders):
        calls.append((name, split, decoders))
        return rows

    module = types.SimpleNamespace(
        features=types.SimpleNamespace(Image=Image, ClassLabel=ClassLabel),
        builder=lambda name: types.SimpleNamespace(info=types.SimpleNamespace(features=features)),
        decode=types.SimpleNamespace(SkipDecoding=lambda: "as stored"),
        data_source=data_source,
    )
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
    source = open_source(path)
    assert calls == [(name, split, {"image": "as stored"})]
    assert source[0].image == IMAGES[0]
    assert source[0].label == 1 and isinstance(source[0].label, int)
    np.testing.assert_array_equal(decode(source[1].image), make_image(1))
    assert source.describe() == f"2 images in 2 classes from TFDS data set {path}"


def test_tfds_needs_a_split(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", types.SimpleNamespace())
    with pytest.raises(DataError, match="must name a split"):
        open_source("tfds:mnist")
    with pytest.raises(DataError, match="tfds:mnist:train cannot be opened"):
        open_source("tfds:mnist:train")  # a package without the function we call
