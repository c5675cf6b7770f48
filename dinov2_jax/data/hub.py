"""Data sets of Hugging Face `datasets` and of TensorFlow Datasets, with random access.

Images come as stored, so that decoding happens in the pipeline like that of all other sources.
Both libraries are optional (the extra `data`) and imported only when a path asks for them.
"""

import contextlib
import os
import re
from collections.abc import Iterator

import numpy as np

from dinov2_jax.data.records import BadImage, DataError, Record, Source, require_images
from dinov2_jax.faults import refusal

_PIP = "pip install -e '.[data]'"
_TFDS_PATH = re.compile(r"(?P<name>[^:]+(:\d+\.\d+\.\d+)?):(?P<split>.+)")


class HuggingFaceSource(Source):
    """One split of a Hugging Face data set with an image column."""

    kind = "Hugging Face data set"

    def __init__(self, path: str):
        """Opens "name:split", "owner/name:split" or "owner/name/config:split".

        A name that is a folder on disk is read with `load_from_disk`.

        Raises:
          DataError: `datasets` is missing, the path has no split, or no column holds images.
          PassingFault: the hub cannot be reached now.
        """
        self.path, self.rejected = f"hf:{path}", []
        try:
            import datasets
        except ImportError as error:
            raise DataError(f"{self.path} needs the package datasets: {_PIP}") from error
        name, _, split = path.rpartition(":")
        if not name or not split:
            raise DataError(f"{self.path} must name a split: hf:owner/name:train")
        with _library_errors(self.path):
            if os.path.isdir(name):
                loaded = datasets.load_from_disk(name)
                rows = loaded[split] if isinstance(loaded, dict) else loaded
            else:
                owner_and_name, config = name, None
                if name.count("/") == 2:
                    owner_and_name, config = name.rsplit("/", 1)
                rows = datasets.load_dataset(owner_and_name, config, split=split)
        images = [k for k, v in rows.features.items() if isinstance(v, datasets.Image)]
        labels = [k for k, v in rows.features.items() if isinstance(v, datasets.ClassLabel)]
        if not images:
            raise DataError(f"{self.path} has no image column, only {sorted(rows.features)}")
        self._image, self._label = images[0], labels[0] if labels else None
        self.label_names = tuple(rows.features[self._label].names) if labels else ()
        columns = [self._image, *labels[:1]]
        self._rows = rows.cast_column(self._image, datasets.Image(decode=False))
        self._rows = self._rows.select_columns(columns)
        require_images(self, cure="choose a split that has rows")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        stored = row[self._image] or {}
        image = stored.get("bytes")
        if image is None:
            image = _read_file(stored.get("path"))
        label = row[self._label] if self._label else None
        return Record(image, self.name(index), label)

    def name(self, index: int) -> str:
        return f"{self.path}[{index}]"


class TfdsSource(Source):
    """One split of a TFDS data set in a random-access format (ArrayRecord)."""

    kind = "TFDS data set"

    def __init__(self, path: str):
        """Opens "name:split", "name/config:split" or "name:1.2.3:split".

        Raises:
          DataError: `tensorflow_datasets` is missing, the path has no split, or no feature holds
            images.
          PassingFault: its files cannot be reached now.
        """
        self.path, self.rejected = f"tfds:{path}", []
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise DataError(f"{self.path} needs the package tensorflow_datasets: {_PIP}") from error
        match = _TFDS_PATH.fullmatch(path)
        if match is None:
            raise DataError(f"{self.path} must name a split: tfds:name:train")
        with _library_errors(self.path):
            features = tfds.builder(match["name"]).info.features
        images = [k for k, v in features.items() if isinstance(v, tfds.features.Image)]
        labels = [k for k, v in features.items() if isinstance(v, tfds.features.ClassLabel)]
        if not images:
            raise DataError(f"{self.path} has no image feature, only {sorted(features)}")
        self._image, self._label = images[0], labels[0] if labels else None
        self.label_names = tuple(features[self._label].names) if labels else ()
        with _library_errors(self.path):
            self._rows = tfds.data_source(
                match["name"],
                split=match["split"],
                decoders={self._image: tfds.decode.SkipDecoding()},
            )
        require_images(self, cure="choose a split that has rows")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        image = row[self._image]
        if not isinstance(image, bytes):
            image = np.asarray(image)
            image = image.item() if image.ndim == 0 else image
        label = int(row[self._label]) if self._label else None
        return Record(image, self.name(index), label)

    def name(self, index: int) -> str:
        return f"{self.path}[{index}]"


@contextlib.contextmanager
def _library_errors(path: str) -> Iterator[None]:
    """Turns whatever a library raises (no network, no such name or split) into one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        text = f"{path} cannot be opened: {reason[:300]}"
        raise refusal(DataError, text, cause=error) from error


def _read_file(path: str | None) -> bytes:
    try:
        with open(path or "", "rb") as file:
            return file.read()
    except OSError as error:
        raise BadImage(error.strerror or "unreadable") from error
