"""DAVIS' layout: folders, masks of all kinds, and what is missing."""

import numpy as np
import pytest
from PIL import Image

from dinov2_jax.data.records import DataError
from dinov2_jax.evals.davis import open_davis, read_masks


def write_clip(root, name, masks, *, inner="", palette=True):
    for part in ("JPEGImages", "Annotations"):
        (root / part / inner / name).mkdir(parents=True)
    for i, mask in enumerate(masks):
        image = Image.new("RGB", (6, 4))
        image.save(root / "JPEGImages" / inner / name / f"{i:05d}.jpg")
        if mask is None:
            continue
        image = Image.fromarray(np.full((4, 6), mask, np.uint8))
        if palette:
            image.putpalette([0] * 768)
        image.save(root / "Annotations" / inner / name / f"{i:05d}.png")


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    write_clip(tmp_path, "a", [1, 2, 3])
    for part, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
        for i in range(3):  # 10, 9, 8: as text, 10 comes first
            path = tmp_path / part / "a" / f"{i:05d}.{suffix}"
            path.rename(path.with_stem(str(10 - i)))
    (clip,) = open_davis(str(tmp_path))
    assert [x.stem for x in clip.frames] == ["8", "9", "10"]
    assert [int(x.max()) for x in read_masks(clip)[0]] == [3, 2, 1]


@pytest.mark.parametrize("inner", ["", "480p"])
def test_clips(tmp_path, inner):
    write_clip(tmp_path, "b", [2, 1, None, 255, 2], inner=inner)
    write_clip(tmp_path, "a", [255, 0, 255], inner=inner, palette=False)
    clips = open_davis(str(tmp_path))
    assert [clip.name for clip in clips] == ["a", "b"]
    assert clips[1].scored == [1, 3] and len(clips[1].frames) == 5
    masks, num_objects = read_masks(clips[1])
    assert num_objects == 2 and masks[2] is None
    assert [int(x.max()) for x in masks if x is not None] == [2, 1, 255, 2]
    masks, num_objects = read_masks(clips[0])
    assert num_objects == 1 and [int(x.max()) for x in masks] == [1, 0, 1]
    (tmp_path / "val.txt").write_text("b\n")
    for name in ("val.txt", str(tmp_path / "val.txt")):
        (clip,) = open_davis(str(tmp_path), names=[name])
        assert clip.name == "b"


def test_errors_show_the_cure(tmp_path):
    with pytest.raises(DataError, match="holds no JPEGImages; expected"):
        open_davis(str(tmp_path))
    write_clip(tmp_path, "a", [1, None, 1])
    with pytest.raises(DataError, match="clip a must have a mask of its first frame and of one"):
        open_davis(str(tmp_path))
    with pytest.raises(DataError, match=r"clips \['x'\] must be folders in"):
        open_davis(str(tmp_path), names=["x"])
    write_clip(tmp_path, "empty", [0, 1, 1])
    (clip,) = open_davis(str(tmp_path), names=["empty"])
    with pytest.raises(DataError, match="must show an object"):
        read_masks(clip)
    Image.new("RGB", (6, 4)).save(tmp_path / "Annotations" / "empty" / "00000.png")
    with pytest.raises(DataError, match="must be grey or have a palette, not RGB"):
        read_masks(clip)
    Image.new("L", (7, 4), 1).save(tmp_path / "Annotations" / "empty" / "00000.png")
    with pytest.raises(DataError, match="must have one size"):
        read_masks(clip)
