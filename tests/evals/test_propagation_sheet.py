"""Masks over frames: colours where objects are, white where the true ones end."""

import numpy as np
from PIL import Image

from dinov2_jax.evals.davis import VOID, Clip
from dinov2_jax.evals.propagation_sheet import COLORS, overlay, palette, propagation_sheet


def test_overlay():
    image = np.full((20, 30, 3), 100, np.uint8)
    mask, truth = np.zeros((2, 20, 30), np.uint8)
    mask[:10, :10] = 1
    mask[:10, 20:] = 2
    truth[12:, 12:18] = 1
    truth[:, 29] = VOID
    found = overlay(image, mask, truth)
    for number, place in ((1, (5, 5)), (2, (5, 25))):
        expected = 0.45 * 100 + 0.55 * COLORS[number - 1]
        np.testing.assert_allclose(found[place], expected, atol=0.5)
    assert (found[19, 2] == 100).all() and (found[15, 15] == 100).all()
    assert (found[15, 12] == 255).all()
    assert (overlay(image, mask, None)[15, 12] == 100).all()
    assert palette()[:3] == [0, 0, 0] and palette()[3:6] == COLORS[0].tolist()
    assert len(palette()) == 768


def test_sheet(tmp_path):
    frames = [tmp_path / f"{i}.jpg" for i in range(3)]
    for frame in frames:
        Image.new("RGB", (60, 40)).save(frame)
    clips = [Clip(name, frames, frames) for name in "ab"]
    mask = np.ones((20, 30), np.uint8)
    read = []

    def masks_of(clip):
        read.append(clip.name)
        return [mask] * 3

    sheet = propagation_sheet(
        clips, masks_of, lambda clip: [mask, None, mask], {"a": "a: J 1", "b": ""}, num_clips=1
    )
    assert read == ["a"] and [cell.name for cell in sheet.cells] == ["a: J 1"]
    assert sheet.cells[0].image.width > 3 * 240
