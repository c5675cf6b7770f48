"""The video command on folders of coloured frames."""

import json

import numpy as np
import pytest
from PIL import Image

from dinov2_jax.evals.__main__ import main


@pytest.fixture
def videos(tmp_path):
    """Two classes: colours come in one order or in the other, so that means are all alike."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for i in range(2 * count):
            name, folder = ("rise", "fall")[i % 2], tmp_path / split / ("rise", "fall")[i % 2]
            levels = np.linspace(40, 215, 8)
            levels = levels if name == "rise" else levels[::-1]
            (folder / str(i)).mkdir(parents=True)
            for frame, level in enumerate(levels):
                half = np.full((28, 28, 3), level) + rng.normal(0, 5, (28, 28, 3))
                half[:, 14:] = 255 - half[:, 14:]  # CLS of pixels is centred: levels show as edges
                image = Image.fromarray(half.clip(0, 255).astype(np.uint8))
                image.save(folder / str(i) / f"{frame}.png")
    return tmp_path


def test_order_is_seen_where_frames_are_joined(videos, tmp_path):
    flags = "--iterations 60 --probe-batch-size 8 --crop 28 --resize 28 --batch-size 4 --threads 2"
    found = {}
    for pooling in ("concat", "mean"):
        out = tmp_path / f"out_{pooling}"
        command = ["video", "--model", "pixels:7", "--data", str(videos), "--out", str(out)]
        assert main([*command, "--pooling", pooling, *flags.split()]) == 0
        found[pooling] = json.loads((out / "result.json").read_text())
    assert found["concat"]["metrics"]["top1"] == 100
    assert found["mean"]["metrics"]["top1"] < 100
    assert found["concat"]["counts"] == {
        "train": 16,
        "test": 8,
        "classes": 2,
        "missing": 0,
        "unreadable": 0,
    }
    assert found["mean"]["protocol"]["pooling"] == "mean"
