"""Images in plain tar files, indexed once and then read at random. Numpy only.

WebDataset layout: members that share a name up to its first dot belong together, and a `.cls` or a
`.json` with a "label" beside an image is its label; without those, folders are.
An index holds offsets, so nothing is unpacked; compressed tar files cannot be indexed.
"""

import json
import mmap
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dinov2_jax.data.image_ops import IMAGE_SUFFIXES, NUM_SNIFFED_BYTES, image_format
from dinov2_jax.data.records import (
    BadImage,
    DataError,
    Record,
    Source,
    Strings,
    folder_labels,
    require_images,
)

_BLOCK = 512
_COMPRESSED = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ", "xz"),
    (b"(\xb5/\xfd", "zstd"),
)
_REGULAR, _LONG_NAME, _PAX = b"0\x007", b"L", b"x"
_LABEL_EXTENSIONS = ("cls", "json")


class Member(NamedTuple):
    """A regular file in a tar file."""

    name: str
    offset: int  # of its content
    size: int


class TarSource(Source):
    """Images in tar shards; a shard is opened for each read, so nothing stays open."""

    def __init__(self, path: str, shards: list[str]):
        """Indexes the shards.

        Raises:
          DataError: no usable image, or a shard that is no plain tar file.
        """
        self.path, self.rejected = path, []
        self.kind = f"tar ({len(shards)} shard{'s' * (len(shards) > 1)})"
        self._shards = shards
        index = _Index()
        for i, shard in enumerate(shards):
            _index_shard(i, shard, index, self.rejected)
        self.num_other_files = index.num_other_files
        self._shard_of = np.asarray(index.shard_of, np.int32)
        self._offsets = np.asarray(index.offsets, np.int64)
        self._sizes = np.asarray(index.sizes, np.int64)
        self._names = Strings(index.names)
        self.label_names, self._labels = _labels(index)
        require_images(
            self, cure="members must be image files: dog/0001.jpg, or 0001.jpg + 0001.cls"
        )

    def __len__(self) -> int:
        return len(self._shard_of)

    def __getitem__(self, index: int) -> Record:
        try:
            with open(self._shards[self._shard_of[index]], "rb", buffering=0) as file:
                file.seek(int(self._offsets[index]))
                image = file.read(int(self._sizes[index]))
        except OSError as error:
            raise BadImage(error.strerror or "unreadable") from error
        label = None if self._labels is None else int(self._labels[index])
        return Record(image, self.name(index), label)

    def name(self, index: int) -> str:
        return f"{self._shards[self._shard_of[index]]}/{self._names[index]}"


class _Index:
    """What indexing collects; one entry an image, over all shards."""

    def __init__(self):
        self.shard_of: list[int] = []
        self.offsets: list[int] = []
        self.sizes: list[int] = []
        self.names: list[str] = []
        self.label_texts: list[str | None] = []
        self.num_other_files = 0


def members(tar: mmap.mmap) -> Iterator[Member]:
    """Regular files of a tar file in its memory map: ustar, GNU and pax names.

    Five times as quick as `tarfile`, for which a million members take a minute.

    Raises:
      ValueError: a damaged or cut-off header; the members before it have been given.
    """
    position, next_name, next_size = 0, None, None
    while position + _BLOCK <= len(tar):
        header = tar[position : position + _BLOCK]
        if header == bytes(_BLOCK):
            return
        content = position + _BLOCK
        try:
            is_sound = _number(header[148:156]) == sum(header[:148]) + 256 + sum(header[156:])
            size = _number(header[124:136])
        except ValueError:
            is_sound = False
        if not is_sound:
            raise ValueError(f"damaged tar header at byte {position}")
        kind = header[156:157]
        if kind == _PAX:
            fields = _pax_fields(tar[content : content + size])
            next_name = fields.get("path", next_name)
            next_size = int(fields["size"]) if "size" in fields else None
        elif kind == _LONG_NAME:
            next_name = _text(tar[content : content + size])
        else:
            size = next_size if next_size is not None else size
            if kind in (b"0", b"\x00", b"7"):
                yield Member(next_name or _ustar_name(header), content, size)
            next_name = next_size = None
        position = content + -(-size // _BLOCK) * _BLOCK
    if position != len(tar):
        raise ValueError(f"the tar file is cut off at byte {len(tar)}")


def _index_shard(number: int, shard: str, index: _Index, rejected: list) -> None:
    try:
        with open(shard, "rb") as file:
            header = file.read(6)
            for magic, name in _COMPRESSED:
                if header.startswith(magic):
                    raise DataError(
                        f"{shard} is compressed ({name}) and cannot be read at random; unpack it "
                        "to a plain .tar, images do not compress further"
                    )
            if not header:
                rejected.append((shard, "zero bytes"))
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
                _index_members(number, shard, tar, index, rejected)
    except OSError as error:
        rejected.append((shard, error.strerror or "unreadable"))


def _index_members(number: int, shard: str, tar: mmap.mmap, index: _Index, rejected: list) -> None:
    images: list[tuple[str, Member]] = []  # (key, member)
    labels: dict[str, str] = {}
    has_label_files = False
    try:
        for member in members(tar):
            folder, _, file_name = member.name.rpartition("/")
            if file_name.startswith("."):
                continue
            stem, _, extension = file_name.partition(".")
            key = f"{folder}/{stem}"
            end = member.offset + member.size
            sniffed = tar[member.offset : min(member.offset + NUM_SNIFFED_BYTES, end)]
            is_complete = end <= len(tar)
            if image_format(sniffed) and is_complete:
                images.append((key, member))
            elif file_name.lower().endswith(IMAGE_SUFFIXES):
                reason = "truncated" if not is_complete else "not an image"
                rejected.append((f"{shard}/{member.name}", reason if member.size else "zero bytes"))
            elif extension.lower() in _LABEL_EXTENSIONS and is_complete:
                has_label_files = True
                text = _label_text(extension.lower(), tar[member.offset : end])
                if text is not None and (extension.lower() == "cls" or key not in labels):
                    labels[key] = text
            else:
                index.num_other_files += 1
    except ValueError as error:
        rejected.append((shard, str(error)))
    seen = set()
    for key, member in images:
        if has_label_files:
            if key in seen:  # a second image of a group, such as its segmentation
                index.num_other_files += 1
                continue
            seen.add(key)
        index.shard_of.append(number)
        index.offsets.append(member.offset)
        index.sizes.append(member.size)
        index.names.append(member.name)
        index.label_texts.append(labels.get(key))


def _labels(index: _Index) -> tuple[tuple[str, ...], np.ndarray | None]:
    if not index.names:
        return (), None
    if all(text is not None for text in index.label_texts):
        distinct = set(index.label_texts)
        is_numeric = all(text.isdecimal() for text in distinct)
        names = tuple(sorted(distinct, key=int if is_numeric else None))
        number = {name: i for i, name in enumerate(names)}
        return names, np.array([number[text] for text in index.label_texts], np.int32)
    folders: dict[str, int] = {}
    folder_of = [
        folders.setdefault(name.removeprefix("./").rpartition("/")[0], len(folders))
        for name in index.names
    ]
    return folder_labels(list(folders), np.asarray(folder_of))


def _label_text(extension: str, content: bytes) -> str | None:
    text = content.decode("utf-8", "replace").strip()
    if extension == "cls":
        return text or None
    try:
        label = json.loads(text)["label"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(label)


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # base 256, for sizes above 8 GiB
        return int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
    return int(field.strip(b" \x00") or b"0", 8)


def _text(content: bytes) -> str:
    return content.split(b"\x00", 1)[0].decode("utf-8", "surrogateescape")


def _ustar_name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\x00" else ""
    return f"{prefix}/{name}" if prefix else name


def _pax_fields(content: bytes) -> dict[str, str]:
    fields = {}
    while content:
        length, space, rest = content.partition(b" ")
        if not space:
            break
        field = rest[: int(length) - len(length) - 2]
        key, _, value = field.partition(b"=")
        fields[key.decode()] = value.decode("utf-8", "surrogateescape")
        content = content[int(length) :]
    return fields
