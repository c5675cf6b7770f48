"""Source messages, the string table and class names from folders."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinov2_jax.data.records import (
    DataError,
    Record,
    Source,
    Strings,
    count_reasons,
    folder_labels,
    require_images,
)


class _Fixed(Source):
    path, kind = "here", "memory"

    def __init__(self, length, rejected=(), num_other_files=0, label_names=()):
        self._length, self.rejected = length, list(rejected)
        self.num_other_files, self.label_names = num_other_files, label_names

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        return Record(b"", f"record {index}", None)


def test_describe_says_what_was_found_and_what_was_not():
    rejected = [("a", "zero bytes"), ("b", "missing"), ("c", "zero bytes")]
    source = _Fixed(1234, rejected, num_other_files=2, label_names=("cat", "dog"))
    assert source.describe() == (
        "1,234 images in 2 classes from memory here; rejected 3: 2 zero bytes, 1 missing; "
        "passed over 2 other files"
    )
    assert _Fixed(5).describe() == "5 images from memory here"
    assert _Fixed(5).name(3) == "record 3"


def test_a_source_without_images_is_an_error_that_names_reasons_and_cure():
    with pytest.raises(DataError, match=r"no image in memory here \(7 files.*; look elsewhere"):
        require_images(_Fixed(0, num_other_files=7), cure="look elsewhere")
    with pytest.raises(DataError, match=r"all 2 candidates were rejected.*the first is a: missing"):
        require_images(_Fixed(0, [("a", "missing"), ("b", "missing")]), cure="look elsewhere")
    assert len(require_images(_Fixed(1, [("a", "missing")]), cure="")) == 1


def test_reasons_are_counted_commonest_first():
    assert count_reasons([("a", "x"), ("b", "y"), ("c", "y")]) == "2 y, 1 x"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_strings_come_back(strings):
    table = Strings(strings)
    assert len(table) == len(strings)
    assert [table[i] for i in range(len(table))] == strings


def test_strings_keep_file_names_that_are_no_utf8():
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    assert Strings([name])[0] == name


@pytest.mark.parametrize(
    "folders, names, labels",
    [
        (["b", "a"], ("a", "b"), [1, 0]),
        (["train/b/x", "train/a/y"], ("a", "b"), [1, 0]),  # what all share is no class
        (["a/x", "a/y", "b"], ("a", "b"), [0, 0, 1]),
        (["only"], ("only",), [0]),
        (["", "a"], (), None),  # an image outside of all class folders
        ([""], (), None),
    ],
)
def test_class_folders(folders, names, labels):
    found_names, found = folder_labels(folders, np.arange(len(folders)))
    assert found_names == names
    assert labels is None if found is None else found.tolist() == labels


def test_folders_without_images_are_no_classes():
    names, labels = folder_labels(["", "a", "b", "empty"], np.array([1, 2, 2]))
    assert names == ("a", "b")
    assert labels.tolist() == [0, 1, 1]
