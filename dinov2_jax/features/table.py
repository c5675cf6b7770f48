"""The table beside the arrays: which image each row is of; and the list of those left out."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

TABLE_FILE, BAD_IMAGES_FILE = "table.parquet", "bad_images.txt"

Bad = tuple[str, str]  # name, reason


class Row(NamedTuple):
    """An image of the table."""

    id: int  # its index in the source
    path: str
    label: int | None


class StoreError(ValueError):
    """A target that cannot be used; its text is one line for the user."""


def printable(name: str) -> str:
    """A file name as text: bytes that are no UTF-8 become escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def one_line(text: str) -> str:
    """`printable`, and without line breaks and tabs."""
    return " ".join(printable(text).split())


def format_bad(bad: Sequence[Bad]) -> str:
    """Lines of `bad_images.txt`."""
    return "".join(f"{one_line(name)}\t{one_line(reason)}\n" for name, reason in bad)


def require_pyarrow() -> None:
    """Raises StoreError, with its pip line, where Parquet cannot be written."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise StoreError(
            "a folder of features has its table in Parquet, which needs pyarrow: "
            "pip install -e '.[parquet]'; or choose a file, OUT.npz or OUT.safetensors"
        ) from error


def write_table(path: pathlib.Path, rows: Sequence[Row], labelled: bool) -> None:
    """Writes rows as Parquet: `id`, `path` and, where there are any, `label`."""
    import pyarrow
    import pyarrow.parquet

    columns = {
        "id": pyarrow.array([row.id for row in rows], pyarrow.int64()),
        "path": pyarrow.array([printable(row.path) for row in rows], pyarrow.string()),
    }
    if labelled:
        columns["label"] = pyarrow.array([row.label for row in rows], pyarrow.int32())
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
