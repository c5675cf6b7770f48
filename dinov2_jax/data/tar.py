"""Images in plain tar files, indexed once and then read at random. Numpy only.

An index holds offsets, so nothing is unpacked. Labels come from the files beside the images, see
`tar_index`; without those, folders are labels.
"""

import numpy as np

from dinov2_jax.data.files import DISK, Disk, Store
from dinov2_jax.data.records import (
    BadImage,
    Record,
    Source,
    Strings,
    folder_labels,
    require_images,
)
from dinov2_jax.data.tar_index import index_file
from dinov2_jax.data.tar_objects import index_objects


class TarSource(Source):
    """Images in tar shards; a shard is opened for each read, so nothing stays open."""

    def __init__(self, path: str, shards: list[str], files: Disk | Store = DISK):
        """Indexes the shards.

        Raises:
          DataError: no usable image, or a shard that is no plain tar file.
        """
        self.path = path
        self.kind = f"tar ({len(shards)} shard{'s' * (len(shards) > 1)})"
        self._shards, self._files = shards, files
        if isinstance(files, Store):
            indexes = index_objects(shards, files)
        else:
            indexes = [index_file(shard) for shard in shards]
        self.rejected = [tuple(item) for index in indexes for item in index.rejected]
        self.num_other_files = sum(index.num_other_files for index in indexes)
        self._shard_of = np.repeat(
            np.arange(len(shards), dtype=np.int32), [len(index.names) for index in indexes]
        )
        self._offsets = np.array([x for index in indexes for x in index.offsets], np.int64)
        self._sizes = np.array([x for index in indexes for x in index.sizes], np.int64)
        names = [name for index in indexes for name in index.names]
        self._names = Strings(names)
        self.label_names, self._labels = _labels(
            names, [text for index in indexes for text in index.label_texts]
        )
        require_images(
            self, cure="members must be image files: dog/0001.jpg, or 0001.jpg + 0001.cls"
        )

    def __len__(self) -> int:
        return len(self._shard_of)

    def __getitem__(self, index: int) -> Record:
        try:
            image = self._files.read_range(
                self._shards[self._shard_of[index]],
                int(self._offsets[index]),
                int(self._sizes[index]),
            )
        except OSError as error:
            raise BadImage(error.strerror or "unreadable") from error
        label = None if self._labels is None else int(self._labels[index])
        return Record(image, self.name(index), label)

    def name(self, index: int) -> str:
        return f"{self._shards[self._shard_of[index]]}/{self._names[index]}"


def _labels(names: list[str], texts: list[str | None]) -> tuple[tuple[str, ...], np.ndarray | None]:
    if not names:
        return (), None
    if all(text is not None for text in texts):
        distinct = set(texts)
        is_numeric = all(text.isdecimal() for text in distinct)
        classes = tuple(sorted(distinct, key=int if is_numeric else None))
        number = {name: i for i, name in enumerate(classes)}
        return classes, np.array([number[text] for text in texts], np.int32)
    folders: dict[str, int] = {}
    folder_of = [
        folders.setdefault(name.removeprefix("./").rpartition("/")[0], len(folders))
        for name in names
    ]
    return folder_labels(list(folders), np.asarray(folder_of))
