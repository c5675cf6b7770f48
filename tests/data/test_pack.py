"""Packing: everything comes back from the files, names and labels included."""

import pytest

from dinov2_jax.data.image_ops import decode
from dinov2_jax.data.pack import main, pack
from dinov2_jax.data.records import DataError
from dinov2_jax.data.sources import open_source


def test_a_folder_comes_back(photo_folder, tmp_path, capsys):
    (photo_folder / "class_0" / "bad.jpg").write_bytes(b"")
    assert main([str(photo_folder), str(tmp_path / "out"), "--shards", "3"]) == 0
    printed = capsys.readouterr().out
    assert "24 images in 3 classes" in printed
    assert "left out:" in printed and "bad.jpg: zero bytes" in printed
    assert "packed 24 images" in printed

    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == [f"images.array_record-0000{i}-of-00003" for i in range(3)]
    folder = open_source(str(photo_folder))
    packed = open_source(str(tmp_path / "out" / "images.array_record*"))
    assert packed.label_names == folder.label_names
    assert [packed[i] for i in range(24)] == [folder[i] for i in range(24)]
    assert packed.name(7) == folder.name(7)
    # A part of the files knows its classes too.
    part = open_source(str(tmp_path / "out" / "images.array_record-00002-of-00003"))
    assert part.label_names == folder.label_names and part[0] == folder[16]


def test_arrays_are_stored_without_loss(tmp_path):
    photos = open_source("photos:right")
    pack(photos, str(tmp_path), num_shards=1)
    packed = open_source(str(tmp_path / "images.array_record*"))
    for i in (0, 7):
        assert (decode(packed[i].image) == decode(photos[i].image)).all()
        assert packed[i].label == i


def test_nothing_is_overwritten(photo_folder, tmp_path, capsys):
    arguments = [str(photo_folder), str(tmp_path / "out")]
    assert main(arguments) == 0
    assert main(arguments) == 1
    assert "exists; remove it" in capsys.readouterr().err


def test_errors(photo_folder, tmp_path, capsys):
    with pytest.raises(DataError, match=r"num_shards=25 must lie between 1 and .* 24"):
        pack(open_source(str(photo_folder)), str(tmp_path / "out"), num_shards=25)
    assert main(["/no/such/folder", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: nothing found at '")


def test_an_image_that_vanished_is_left_out(photo_folder, tmp_path):
    source = open_source(str(photo_folder))
    (photo_folder / "class_1" / "01.jpg").unlink()
    left_out = pack(source, str(tmp_path / "out"), num_shards=2)
    assert [(name[-14:], reason) for name, reason in left_out] == [
        ("class_1/01.jpg", "No such file or directory")
    ]
    assert len(open_source(str(tmp_path / "out" / "*array_record*"))) == 23
