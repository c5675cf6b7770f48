"""Frames of the retrieval sheet tell right, wrong and junk apart."""

import numpy as np
import pytest
from PIL import Image

from dinov2_jax.evals.retrieval_sheet import COLORS, retrieval_sheet


def test_frames(tmp_path):
    for i in range(4):
        Image.new("RGB", (20, 30), (0, 0, 60 * i)).save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(4)]
    sheet = retrieval_sheet(
        queries=paths[:1],
        database=paths[1:],
        orders=np.array([[2, 0, 1]]),
        positives=[[0]],
        junk=[[2]],
        notes={0: "average precision 1.000"},
        tile_px=40,
    )
    assert [cell.name for cell in sheet.cells] == ["average precision 1.000"]
    pixels = np.asarray(sheet.draw())
    lefts = {
        kind: np.argwhere((pixels == color).all(axis=-1))[:, 1].min()
        for kind, color in COLORS.items()
    }
    assert lefts["junk"] < lefts["right"] < lefts["wrong"]
    (tmp_path / "0.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"0\.png cannot be used"):
        retrieval_sheet(
            queries=paths[:1], database=paths[1:], orders=np.array([[0]]), positives=[[]],
            junk=[[]], notes={},
        )  # fmt: skip
