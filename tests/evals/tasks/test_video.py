"""The video command on folders of coloured frames."""

import json

import numpy as np
import pytest
from PIL import Image

from dinov2_jax.evals.__main__ import main


@pytest.fixture
def videos(tmp_path):
    """Something-Something's layout; colours come in one order or in the other: means are alike."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "20bn-something-something-v2"
    for split, first, count in (("train", 0, 16), ("validation", 16, 8)):
        clips = []
        for i in range(first, first + count):
            rises = bool(i % 2)
            clips.append({"id": i, "template": f"[Something] {'rises' if rises else 'falls'}"})
            levels = np.linspace(40, 215, 8)[:: 1 if rises else -1]
            (folder / str(i)).mkdir(parents=True)
            for frame, level in enumerate(levels):
                image = np.full((28, 28, 3), level) + rng.normal(0, 5, (28, 28, 3))
                image[:, 14:] = 255 - image[:, 14:]  # CLS of pixels is centred: edges are seen
                image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
                image.save(folder / str(i) / f"{frame}.png")
        (tmp_path / f"{split}.json").write_text(json.dumps(clips))
    return tmp_path


def test_order_is_seen_where_frames_are_joined(videos, tmp_path):
    flags = "--iterations 60 --probe-batch-size 8 --crop 28 --resize 28 --batch-size 4 --threads 2"
    found = {}
    for pooling, asked in (("concat", []), ("mean", ["--pooling", "mean"])):
        out = tmp_path / f"out_{pooling}"
        command = ["video", "--model", "pixels:7", "--data", str(videos), "--out", str(out)]
        assert main([*command, *asked, *flags.split()]) == 0
        found[pooling] = json.loads((out / "result.json").read_text())
        assert found[pooling]["protocol"]["pooling"] == pooling
    assert found["concat"]["metrics"]["top1"] == 100
    assert found["mean"]["metrics"]["top1"] < 100
    assert found["concat"]["counts"] == {
        "train": 16,
        "test": 8,
        "classes": 2,
        "missing": 0,
        "unreadable": 0,
    }
