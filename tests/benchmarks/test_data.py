"""The host's work: a line for each way, and colour operations that do what they are called."""

import re
import types

import numpy as np
from PIL import Image

from benchmarks import data
from tests.data.conftest import encode, make_image

UNCHANGED = {"jitter": 0, "grayscale": 0, "blur_sigma": 0, "solarize": 0}


def test_every_way_reads_every_image(monkeypatch, capsys, tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(encode(make_image(i, height=50, width=100)))
    monkeypatch.setattr("sys.argv", ["data", str(tmp_path), "--rounds", "1"])
    data.main()
    _, header, *lines = capsys.readouterr().out.splitlines()
    assert header == "mean image 0.01 million pixels; 1 rounds after a warm-up"
    pattern = r"(\S+) +[\d.]+ images/s/core \([\d.]+ to [\d.]+\); ours is ([\d.]+) times that"
    ways, ratios = zip(*(re.fullmatch(pattern, line).groups() for line in lines), strict=True)
    assert ways == ("ours", "host", "host+pillow") and ratios[0] == "1.00"


class Photos(list):
    """In place of the photographs: the quickstart's packages need not be installed."""

    def name(self, i: int) -> str:
        return f"{i}.png"


def test_photographs_are_written_scaled(monkeypatch, tmp_path):
    sides = [(60, 30), (10, 20)]
    images = (make_image(i, height=h, width=w) for i, (h, w) in enumerate(sides))
    source = Photos(types.SimpleNamespace(image=encode(image, "PNG")) for image in images)
    monkeypatch.setattr(data, "open_source", {"photos:": source}.get)
    data.write_photos(str(tmp_path), long_side=40)
    photos = [data.decode(path.read_bytes()) for path in sorted(tmp_path.glob("*.jpg"))]
    assert [photo.shape for photo in photos] == [(40, 20, 3), (10, 20, 3)]  # never enlarged


def test_colours_on_the_host():
    crop = make_image(0, height=8, width=8)
    plain = data.augment_on_host(crop, UNCHANGED)
    assert plain.dtype == np.float32
    np.testing.assert_allclose(plain * data.STD + data.MEAN, crop / 255, atol=1e-6)
    grey = data.augment_on_host(crop, UNCHANGED | {"grayscale": 1}) * data.STD + data.MEAN
    np.testing.assert_allclose(grey, np.broadcast_to(grey[..., :1], grey.shape), atol=1e-6)
    solarized = data.augment_on_host(crop, UNCHANGED | {"solarize": 1}) * data.STD + data.MEAN
    np.testing.assert_allclose(solarized, np.where(crop < 128, crop, 255 - crop) / 255, atol=1e-6)


def test_a_third_of_the_hue_circle_turns_red_to_green():
    red = Image.new("RGB", (1, 1), (255, 0, 0))
    turned = np.asarray(data.shift_hue(red, 1 / 3))[0, 0]
    np.testing.assert_allclose(turned, (0, 255, 0), atol=1)
