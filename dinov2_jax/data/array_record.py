"""Images in ArrayRecord files, and the record format that `pack` writes. Numpy only.

A record is the 4 bytes `DJR1`, a little-endian uint32 n, n bytes of JSON, and the encoded image.
The JSON holds "name" and, with labels, "label"; in the first record of a file also "label_names".
Records that are bare encoded images are read too; they have no labels.
"""

import json
import struct
import threading

import numpy as np

from dinov2_jax.data.image_ops import NUM_SNIFFED_BYTES, image_format
from dinov2_jax.data.records import BadImage, DataError, Record, Source, require_images

_MAGIC = b"DJR1"
_LENGTH = struct.Struct("<I")
_HEADER = len(_MAGIC) + _LENGTH.size


def encode_record(image: bytes, metadata: dict) -> bytes:
    """Joins an encoded image and its metadata."""
    text = json.dumps(metadata, ensure_ascii=False).encode()
    return b"".join((_MAGIC, _LENGTH.pack(len(text)), text, image))


def decode_record(record: bytes) -> tuple[bytes, dict]:
    """Splits a record into image and metadata; a bare image has none.

    Raises:
      ValueError: the record is cut off or damaged.
    """
    if not record.startswith(_MAGIC):
        return record, {}
    (length,) = _LENGTH.unpack_from(record, len(_MAGIC))
    return record[_HEADER + length :], json.loads(record[_HEADER : _HEADER + length])


class ArrayRecordSource(Source):
    """Images in ArrayRecord files, each opened by the process that first reads it."""

    def __init__(self, path: str, files: list[str]):
        """Opens every file once, to count its records.

        Raises:
          DataError: no usable image, or records of another kind.
        """
        self.path, self.rejected = path, []
        self.kind = f"ArrayRecord ({len(files)} file{'s' * (len(files) > 1)})"
        self._files, counts, names = [], [], []
        for file in files:
            try:
                reader = _open(file)
                count = reader.num_records()
                first = reader.read([0])[0] if count else b""
                reader.close()
                image, metadata = decode_record(first)
            except (RuntimeError, ValueError, IndexError, OSError, struct.error) as error:
                reason = "unreadable" if str(error) else type(error).__name__
                self.rejected.append((file, reason))
                continue
            if count and image_format(image[:NUM_SNIFFED_BYTES]) is None and not metadata:
                raise DataError(
                    f"the records of {file} are no encoded images; write them with "
                    "'python -m dinov2_jax.data.pack', or open a TFDS data set as tfds:name:split"
                )
            self._files.append(file)
            counts.append(count)
            names.append(metadata.get("label_names", []))
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._relabel: list[list[int]] = []
        if names and all(names):
            is_joint = all(of_file == names[0] for of_file in names)
            self.label_names = tuple(names[0] if is_joint else sorted(set().union(*names)))
            number = {name: i for i, name in enumerate(self.label_names)}
            self._relabel = [[number[name] for name in of_file] for of_file in names]
        self._forget_readers()
        require_images(self, cure="use files that 'dinov2_jax.data.pack' has written")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Record:
        image, metadata, file = self._read(index)
        label = self._relabel[file][metadata["label"]] if self._relabel else None
        return Record(image, self._name(index, metadata), label)

    def name(self, index: int) -> str:
        try:
            _, metadata, _ = self._read(index)
        except BadImage:
            metadata = {}
        return self._name(index, metadata)

    def _name(self, index: int, metadata: dict) -> str:
        return metadata.get("name") or f"{self.path}[{index}]"

    def _read(self, index: int) -> tuple[bytes, dict, int]:
        file = int(np.searchsorted(self._ends, index, side="right"))
        position = index - (int(self._ends[file - 1]) if file else 0)
        try:
            with self._lock:
                if self._readers[file] is None:
                    self._readers[file] = _open(self._files[file])
            return *decode_record(self._readers[file].read([position])[0]), file
        except (RuntimeError, ValueError, IndexError, OSError, struct.error) as error:
            raise BadImage(f"unreadable record: {str(error)[:80]}") from error

    def _forget_readers(self) -> None:
        self._readers = [None] * len(self._files)
        self._lock = threading.Lock()

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_readers", "_lock")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._forget_readers()


def _open(file: str):
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError as error:
        raise DataError(f"{file} needs array_record: pip install array_record") from error
    # Random access gains nothing from reading ahead.
    return ArrayRecordReader(file, options="readahead_buffer_size:0", file_reader_buffer_size=32768)
