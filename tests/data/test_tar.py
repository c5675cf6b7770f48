"""Tar shards: the index against `tarfile`, WebDataset groups, labels, damaged shards."""

import gzip
import io
import mmap
import pickle
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov2_jax.data.records import DataError
from dinov2_jax.data.sources import open_source
from dinov2_jax.data.tar_index import Member, members
from tests.data.conftest import encode, make_image

IMAGES = [encode(make_image(i)) for i in range(4)]


def _tar(files, format=tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _members(content: bytes) -> list[Member]:
    with mmap.mmap(-1, len(content)) as memory:
        memory[:] = content
        return list(members(memory))


NAMES = st.lists(
    st.text(st.sampled_from("abcäß0. _-"), min_size=1, max_size=160).map(
        lambda name: "d/" * (len(name) // 40) + name.strip("/ ") + "x"
    ),
    max_size=6,
)


@settings(deadline=None, max_examples=60)
@given(
    names=NAMES,
    sizes=st.lists(st.integers(0, 1500), min_size=6, max_size=6),
    format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_those_of_tarfile(names, sizes, format):
    files = [(name, bytes([i]) * sizes[i]) for i, name in enumerate(names)]
    content = _tar([("folder", None), *files], format)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [Member(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    assert _members(content) == expected
    for (_, payload), member in zip(files, expected, strict=True):
        assert content[member.offset : member.offset + member.size] == payload


def test_ustar_prefixes():
    name = "a" * 90 + "/" + "b" * 90
    assert _members(_tar([(name, b"1")]))[0].name == name


def test_sizes_above_8_gib():
    """Base 256 in the size field, as GNU tar writes it."""
    header = bytearray(_tar([("a", b"")])[:512])
    header[124:136] = b"\x80" + (9 * 2**30).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\x00 " % sum(header)
    with mmap.mmap(-1, 512) as memory:
        memory[:] = bytes(header)
        first = next(members(memory))
    assert first.size == 9 * 2**30


def test_folders_in_the_tar_are_labels(tmp_path):
    files = [("n02/1.jpg", IMAGES[0]), ("n01/2.jpg", IMAGES[1]), ("n02/3.JPEG", IMAGES[2])]
    (tmp_path / "a.tar").write_bytes(_tar([("n02", None), *files]))
    source = open_source(str(tmp_path / "a.tar"))
    assert source.label_names == ("n01", "n02")
    assert [source[i].label for i in range(3)] == [1, 0, 1]
    assert [source[i].image for i in range(3)] == IMAGES[:3]
    assert source[1].name == f"{tmp_path}/a.tar/n01/2.jpg"


def test_webdataset_groups(tmp_path):
    """One record a group, labelled by its .cls; the image may come after the label."""
    shard_0 = [
        ("000.cls", b"12\n"),
        ("000.jpg", IMAGES[0]),
        ("000.seg.png", encode(make_image(0), "PNG")),
        ("000.txt", b"a caption"),
        ("001.jpg", IMAGES[1]),
        ("001.json", b'{"label": 3, "width": 10}'),
        ("001.cls", b"7"),
    ]
    shard_1 = [("000.jpg", IMAGES[2]), ("000.json", b'{"label": 12}')]
    for i, files in enumerate((shard_0, shard_1)):
        (tmp_path / f"shard-{i:03d}.tar").write_bytes(_tar(files))
    for path in ("shard-*.tar", "shard-{000..001}.tar"):
        source = open_source(str(tmp_path / path))
        assert source.label_names == ("7", "12")  # in the order of the numbers
        assert [source[i].label for i in range(3)] == [1, 0, 1]
        assert [source[i].image for i in range(3)] == IMAGES[:3]
        assert "tar (2 shards)" in source.describe()
        assert source.num_other_files == 2  # the second image and the caption


def test_dots_in_names_make_no_groups_without_label_files(tmp_path):
    files = [("img.v1.jpg", IMAGES[0]), ("img.v2.jpg", IMAGES[1])]
    (tmp_path / "a.tar").write_bytes(_tar(files))
    assert len(open_source(str(tmp_path / "a.tar"))) == 2


def test_labels_are_only_complete_or_absent(tmp_path):
    files = [("0.jpg", IMAGES[0]), ("0.cls", b"1"), ("1.jpg", IMAGES[1])]
    (tmp_path / "a.tar").write_bytes(_tar(files))
    source = open_source(str(tmp_path / "a.tar"))
    assert source.label_names == () and source[0].label is None


def test_members_that_are_no_images_are_rejected(tmp_path):
    files = [
        ("a/ok.jpg", IMAGES[0]),
        ("a/empty.jpg", b""),
        ("a/text.png", b"hello"),
        ("a/._ok.jpg", b"resource fork"),
        ("a/readme", b"hello"),
    ]
    (tmp_path / "a.tar").write_bytes(_tar(files))
    source = open_source(str(tmp_path / "a.tar"))
    shard = f"{tmp_path}/a.tar"
    assert source.rejected == [
        (f"{shard}/a/empty.jpg", "zero bytes"),
        (f"{shard}/a/text.png", "not an image"),
    ]
    assert len(source) == 1 and source.num_other_files == 1


def test_a_truncated_shard_is_used_as_far_as_it_goes(tmp_path):
    whole = _tar([(f"{i}.jpg", IMAGES[i]) for i in range(4)])
    members_ = _members(whole)
    cut = members_[2].offset + members_[2].size // 2
    (tmp_path / "a.tar").write_bytes(whole[:cut])
    (tmp_path / "b.tar").write_bytes(_tar([("x.jpg", IMAGES[3])]))
    source = open_source(str(tmp_path / "*.tar"))
    assert [source[i].image for i in range(3)] == [*IMAGES[:2], IMAGES[3]]
    assert [reason for _, reason in source.rejected] == [
        "truncated",
        f"the tar file is cut off at byte {cut}",
    ]


def test_a_damaged_header_ends_its_shard(tmp_path):
    whole = bytearray(_tar([(f"{i}.jpg", IMAGES[i]) for i in range(3)]))
    second = _members(bytes(whole))[1].offset - 512
    whole[second + 2] ^= 0xFF
    (tmp_path / "a.tar").write_bytes(whole)
    source = open_source(str(tmp_path / "a.tar"))
    assert len(source) == 1
    assert source.rejected == [(f"{tmp_path}/a.tar", f"damaged tar header at byte {second}")]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
def test_compressed_shards_are_refused_with_a_cure(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(_tar([("x.jpg", IMAGES[0])])))
    with pytest.raises(DataError, match=r"compressed \(gzip\).*unpack it"):
        open_source(str(tmp_path / name))


def test_shards_without_a_usable_image_are_errors(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(DataError, match="1 zero bytes"):
        open_source(str(tmp_path / "a.tar"))
    (tmp_path / "a.tar").write_bytes(b"not a tar file at all" * 100)
    with pytest.raises(DataError, match="damaged tar header at byte 0"):
        open_source(str(tmp_path / "a.tar"))
    (tmp_path / "a.tar").write_bytes(_tar([("readme", b"x")]))
    with pytest.raises(DataError, match=r"no image in tar.*members must be image files"):
        open_source(str(tmp_path / "a.tar"))


def test_a_missing_shard_of_a_range_is_rejected_by_name(tmp_path):
    (tmp_path / "s-0.tar").write_bytes(_tar([("x.jpg", IMAGES[0])]))
    source = open_source(str(tmp_path / "s-{0..1}.tar"))
    assert source.rejected == [(f"{tmp_path}/s-1.tar", "No such file or directory")]


def test_shards_can_be_pickled(tmp_path):
    (tmp_path / "a.tar").write_bytes(_tar([("x.jpg", IMAGES[0])]))
    source = open_source(str(tmp_path / "a.tar"))
    assert pickle.loads(pickle.dumps(source))[0] == source[0]
