"""ArrayRecord files: our record format, bare images, and files that are neither."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinov2_jax.data.array_record import decode_record, encode_record
from dinov2_jax.data.records import BadImage, DataError
from dinov2_jax.data.sources import open_source
from tests.data.conftest import encode, make_image

IMAGES = [encode(make_image(i)) for i in range(5)]


def _write(path, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


@given(st.binary(), st.dictionaries(st.text(), st.integers() | st.text()))
def test_records_come_back(image, metadata):
    assert decode_record(encode_record(image, metadata)) == (image, metadata)


def test_bare_images(tmp_path):
    _write(tmp_path / "x.array_record-0-of-2", IMAGES[:3])
    _write(tmp_path / "x.array_record-1-of-2", IMAGES[3:])
    source = open_source(str(tmp_path / "x.array_record*"))
    assert [source[i].image for i in range(5)] == IMAGES
    assert source.label_names == () and source[0].label is None
    assert source.name(4).endswith("x.array_record*[4]")
    assert "5 images from ArrayRecord (2 files)" in source.describe()


def test_label_names_of_files_packed_apart_are_joined(tmp_path):
    for file, names in (("a", ["cat", "dog"]), ("b", ["ant", "dog"])):
        _write(
            tmp_path / f"{file}.array_record",
            [
                encode_record(IMAGES[0], {"name": file, "label": 1, "label_names": names}),
                encode_record(IMAGES[1], {"name": file, "label": 0}),
            ],
        )
    source = open_source(str(tmp_path / "*.array_record"))
    assert source.label_names == ("ant", "cat", "dog")
    assert [source[i].label for i in range(4)] == [2, 1, 2, 0]


def test_files_that_are_no_array_records(tmp_path):
    (tmp_path / "bad.array_record").write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(DataError, match="all 1 candidates were rejected"):
        open_source(str(tmp_path / "bad.array_record"))
    _write(tmp_path / "good.array_record", IMAGES)
    source = open_source(str(tmp_path / "*.array_record"))
    assert len(source) == 5
    assert [name for name, _ in source.rejected] == [str(tmp_path / "bad.array_record")]


def test_records_of_another_kind_are_an_error(tmp_path):
    _write(tmp_path / "x.array_record", [b"\n\x0bsome proto"])
    with pytest.raises(DataError, match=r"are no encoded images.*data\.pack"):
        open_source(str(tmp_path / "x.array_record"))


def test_an_empty_file_is_an_error(tmp_path):
    _write(tmp_path / "x.array_record", [])
    with pytest.raises(DataError, match="no image in ArrayRecord"):
        open_source(str(tmp_path / "x.array_record"))


def test_a_damaged_record_is_a_bad_image(tmp_path):
    records = [encode_record(IMAGES[0], {"name": "a"}), b"DJR1\xff\xff\x00\x00{"]
    _write(tmp_path / "x.array_record", records)
    source = open_source(str(tmp_path / "x.array_record"))
    with pytest.raises(BadImage, match="unreadable record"):
        source[1]
    assert source.name(1).endswith("[1]")
    assert source[0].name == "a"


def test_readers_stay_behind_when_pickled(tmp_path):
    _write(tmp_path / "x.array_record", IMAGES)
    source = open_source(str(tmp_path / "x.array_record"))
    assert source[2].image == IMAGES[2]
    assert pickle.loads(pickle.dumps(source))[2] == source[2]
