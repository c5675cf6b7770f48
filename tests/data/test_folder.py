"""Folders of any shape and lists: what is found, in which order, and what is rejected."""

import os
import pickle

import pytest

from dinov2_jax.data.records import BadImage, DataError
from dinov2_jax.data.sources import open_source
from tests.data.conftest import encode, make_image

JPEG = encode(make_image(0))
PNG = encode(make_image(1), "PNG")


def _write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _names(source, root):
    return [os.path.relpath(source.name(i), root) for i in range(len(source))]


def test_any_nesting_in_sorted_order(tmp_path):
    _write(
        tmp_path,
        {
            "b/2.jpg": JPEG,
            "b/10.jpg": PNG,  # the content decides, not the suffix
            "a/deep/er/x.JPEG": JPEG,
            "a.jpg": JPEG,
            "no_suffix": PNG,
            "z/öäü.webp": encode(make_image(2), "WEBP"),
            ".hidden/x.jpg": JPEG,
            "b/.x.jpg": JPEG,
            "b/notes.csv": b"1,2",
            "Thumbs.db": b"",
        },
    )
    source = open_source(str(tmp_path))
    names = _names(source, tmp_path)
    assert names == [
        "a/deep/er/x.JPEG",
        "a.jpg",
        "b/10.jpg",
        "b/2.jpg",
        "no_suffix",
        "z/öäü.webp",
    ]
    assert source.rejected == []
    assert source.num_other_files == 2
    record = source[2]
    assert record.image == PNG and record.name == str(tmp_path / "b/10.jpg")
    assert record.label is None and source.label_names == ()
    assert source.describe() == f"6 images from folder {tmp_path}; passed over 2 other files"


def test_class_folders_are_labels(photo_folder):
    source = open_source(str(photo_folder))
    assert source.label_names == ("class_0", "class_1", "class_2")
    for i in range(len(source)):
        record = source[i]
        assert f"class_{record.label}" in record.name
    assert "24 images in 3 classes" in source.describe()


def test_unusable_images_are_rejected_by_name_and_reason(tmp_path):
    _write(
        tmp_path,
        {"ok.jpg": JPEG, "empty.jpg": b"", "text.png": b"hello", "page.jpg": b"<html></html>"},
    )
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    source = open_source(str(tmp_path))
    assert {(os.path.basename(n), r) for n, r in source.rejected} == {
        ("empty.jpg", "zero bytes"),
        ("text.png", "not an image"),
        ("page.jpg", "not an image"),
        ("dangling.jpg", "missing"),
    }
    assert "rejected 4: 2 not an image, 1 " in source.describe()


def test_symbolic_links_are_followed_but_not_in_circles(tmp_path):
    _write(tmp_path, {"data/a/1.jpg": JPEG, "elsewhere/2.jpg": JPEG})
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/file.jpg").symlink_to(tmp_path / "elsewhere/2.jpg")
    source = open_source(str(tmp_path / "data"))
    assert _names(source, tmp_path / "data") == ["a/1.jpg", "file.jpg", "linked/2.jpg"]


def test_folders_without_a_usable_image_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"no image in folder .*holds images, at any depth"):
        open_source(str(tmp_path))
    _write(tmp_path, {"notes.txt": b"hello"})
    with pytest.raises(DataError, match=r"no image .*\(1 files of other kinds\)"):
        open_source(str(tmp_path))
    _write(tmp_path, {"a.jpg": b"", "b.jpg": b""})
    with pytest.raises(DataError, match=r"all 2 candidates were rejected.*2 zero bytes"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match=r"nothing found at .*must be a folder"):
        open_source(str(tmp_path / "gone"))


def test_a_folder_of_shards_says_how_to_open_them(tmp_path):
    _write(tmp_path, {"shards/0.tar": b"x" * 600})
    with pytest.raises(DataError, match=r"use '.*shards/\*\.tar'"):
        open_source(str(tmp_path))


def test_a_file_that_vanishes_is_a_bad_image(photo_folder):
    source = open_source(str(photo_folder))
    os.remove(source.name(3))
    with pytest.raises(BadImage, match="No such file"):
        source[3]
    assert source[4].image


def test_sources_are_small_and_complete_when_pickled(photo_folder):
    source = open_source(str(photo_folder))
    copied = pickle.loads(pickle.dumps(source))
    assert [copied[i] for i in range(24)] == [source[i] for i in range(24)]


def test_lists(tmp_path):
    _write(tmp_path, {"x/a.jpg": JPEG, "x/b.png": PNG, "c.jpg": JPEG, "bad.jpg": b""})
    lines = ["# chosen by hand", "x/b.png", "", "  ", "gone.jpg", "bad.jpg", "./x/../c.jpg"]
    (tmp_path / "list.txt").write_text("\r\n".join([*lines, str(tmp_path / "x/a.jpg")]))
    source = open_source(str(tmp_path / "list.txt"))
    assert _names(source, tmp_path) == ["x/b.png", "c.jpg", "x/a.jpg"]  # the list's order
    assert [source[i].image for i in range(3)] == [PNG, JPEG, JPEG]
    assert source.rejected == [
        (str(tmp_path / "gone.jpg"), "missing"),
        (str(tmp_path / "bad.jpg"), "zero bytes"),
    ]


def test_lists_with_class_names(tmp_path):
    _write(tmp_path, {"a.jpg": JPEG, "b.jpg": PNG})
    (tmp_path / "l.txt").write_text("a.jpg\tzebra\nb.jpg\tant\na.jpg\tant\n")
    source = open_source(str(tmp_path / "l.txt"))
    assert source.label_names == ("ant", "zebra")
    assert [source[i].label for i in range(3)] == [1, 0, 0]
    (tmp_path / "l.txt").write_text("a.jpg\tzebra\nb.jpg\n")
    with pytest.raises(DataError, match="1 of 2 lines have a class name"):
        open_source(str(tmp_path / "l.txt"))


def test_empty_lists_are_errors(tmp_path):
    (tmp_path / "l.txt").write_text("# nothing\n")
    with pytest.raises(DataError, match="no image in list"):
        open_source(str(tmp_path / "l.txt"))
    (tmp_path / "l.txt").write_text("gone.jpg\n")
    with pytest.raises(DataError, match=r"1 missing.*relative to the list's folder"):
        open_source(str(tmp_path / "l.txt"))
