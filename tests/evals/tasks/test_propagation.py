"""The propagation command on a video drawn here, whole and resumed."""

import json

import numpy as np
import pytest
from PIL import Image

from dinov2_jax.evals.__main__ import main
from dinov2_jax.evals.tasks import propagation


@pytest.fixture
def videos(tmp_path):
    """Two clips of a bright square that moves over a dark ground."""
    for name, step in (("slow", 1), ("fast", 3)):
        for i in range(6):
            mask = np.zeros((48, 64), np.uint8)
            mask[16:32, 8 + step * i : 24 + step * i] = 255
            for part, image, suffix in (
                ("JPEGImages", 60 + (mask // 2)[..., None].repeat(3, axis=-1), "jpg"),
                ("Annotations", mask, "png"),
            ):
                folder = tmp_path / part / name
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.astype(np.uint8)).save(folder / f"{i:05d}.{suffix}")
    return tmp_path


def run(data, out, *flags):
    command = ["propagation", "--model", "pixels:4", "--data", str(data), "--out", str(out)]
    return main([*command, *map(str, ("--short-side", 48, "--batch-size", 4, *flags))])


def test_a_square_is_followed_and_clips_are_done_once(videos, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    propagated, propagate = [], propagation.propagate

    def counted(*args, **settings):
        propagated.append(args)
        return propagate(*args, **settings)

    monkeypatch.setattr(propagation, "propagate", counted)
    assert run(videos, out) == 0
    record = json.loads((out / "result.json").read_text())
    assert record["metrics"]["j_mean"] > 75 and record["metrics"]["f_mean"] > 75
    assert record["counts"] == {"test": 12, "clips": 2, "objects": 2, "scored": 8}
    means = [record["metrics"][x] for x in ("j_mean", "f_mean")]
    assert record["metrics"]["j_and_f"] == pytest.approx(np.mean(means))
    mask = np.asarray(Image.open(out / "masks" / "slow" / "00000.png"))
    np.testing.assert_array_equal(
        mask, np.asarray(Image.open(videos / "Annotations" / "slow" / "00000.png")) // 255
    )
    assert (out / "propagation.png").exists() and len(propagated) == 2

    (out / "result.json").unlink()
    (out / "masks" / "fast.json").unlink()
    assert run(videos, out) == 0
    assert len(propagated) == 3  # the clip that was not there any more
    again = json.loads((out / "result.json").read_text())
    assert again["metrics"] == record["metrics"]
    (out / "result.json").unlink()
    assert run(videos, out, "--radius", 3) == 0
    assert len(propagated) == 5  # masks of other settings are not taken

    assert run(videos, tmp_path / "x", "--radius", -1) == 2
    assert "--radius: '-1' must be a whole number, at least 0" in capsys.readouterr().err
