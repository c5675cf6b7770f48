"""Names of the released backbones, and the local folder that their files lie in.

A name becomes a path: a file that is there is used, one that is not is downloaded, checked
against the shapes that its name promises, and remembered by its sha256. Facts: names and
addresses of dinov2/hub/backbones.py (Apache-2.0).
"""

import contextlib
import difflib
import hashlib
import os
import pathlib
import urllib.request
from collections.abc import Iterator

from dinov2_jax.beside import written_beside
from dinov2_jax.convert.read import read_source
from dinov2_jax.convert.torch_file import require_torch

BASE_URL = "https://dl.fbaipublicfiles.com/dinov2"
CACHE_VARIABLE, URL_VARIABLE = "DINOV2_JAX_CACHE", "DINOV2_JAX_HUB_URL"

_SIZES = {
    "vits14": "vit_small",
    "vitb14": "vit_base",
    "vitl14": "vit_large",
    "vitg14": "vit_giant2",
}
# Name -> variant, registers.
RELEASED = {
    f"dinov2_{size}{suffix}": (variant, registers)
    for size, variant in _SIZES.items()
    for suffix, registers in (("", 0), ("_reg", 4))
}
# Of every released file; the position tables are those of 518 px.
PATCH_SIZE, POSITIONS = 14, (37, 37)
_CHUNK_BYTES = 2**20


def find(source: str | os.PathLike) -> pathlib.Path:
    """The path that a name or a path stands for, downloading where it must.

    Raises:
      FileNotFoundError: nothing there; the message says what would be.
      ValueError: a file that is not what its name or its recorded sha256 promises.
    """
    path = pathlib.Path(source).expanduser()
    if path.exists():
        return path
    name = os.fspath(source)
    if name in RELEASED:
        return released(name)
    nearest = difflib.get_close_matches(name, RELEASED, n=1)
    raise FileNotFoundError(
        f"{name!r} must be a file or folder that exists, or one of {', '.join(RELEASED)}"
        + (f"; did you mean {nearest[0]}?" if nearest else "; check the path")
    )


def cache_folder() -> pathlib.Path:
    """Where released files lie: `$DINOV2_JAX_CACHE`, or `dinov2_jax` in the user's cache."""
    if os.environ.get(CACHE_VARIABLE):
        return pathlib.Path(os.environ[CACHE_VARIABLE]).expanduser()
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dinov2_jax"


def released(name: str) -> pathlib.Path:
    """The file of a released backbone in the cache; downloads it if it is not there.

    `NAME.safetensors` (what `dinov2_jax.convert` writes, which needs no PyTorch) goes before the
    released `.pth`. Every use checks the sha256 that was recorded when the file was first seen.

    Raises:
      FileNotFoundError, ValueError: see `find`.
      ModuleNotFoundError: a `.pth` without PyTorch.
    """
    size = name.removeprefix("dinov2_").removesuffix("_reg")
    stem = f"dinov2_{size}{'_reg4' if RELEASED[name][1] else ''}_pretrain"
    folder = cache_folder()
    path = folder / f"{stem}.pth"
    for candidate in (folder / f"{name}.safetensors", path):
        if candidate.exists():
            _verify(name, candidate)
            return candidate
    require_torch()  # before anything is fetched: without it the file could not be read
    base = os.environ.get(URL_VARIABLE) or BASE_URL
    if "://" not in base:
        raise ValueError(
            f"${URL_VARIABLE}={base!r} must start with https://, http:// or file://; add it"
        )
    url = f"{base}/dinov2_{size}/{path.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Several may fetch it at once.
        with written_beside(path, mark=f"{os.getpid()}") as beside:
            _download(url, beside)
            _verify(name, beside, record=path)
    except OSError as error:  # urllib's errors are among them
        reason = getattr(error, "reason", None) or error
        raise FileNotFoundError(
            f"{name} is not in {folder}, and {url} could not be fetched ({reason}); put the "
            f"released file there as {path}, or a converted one as {folder / name}.safetensors"
        ) from error
    return path


def _verify(name: str, path: pathlib.Path, record: pathlib.Path | None = None) -> None:
    """Compares a file with its recorded sha256; the first time, with the shapes of its name."""
    record = (record or path).with_name(f"{(record or path).name}.sha256")
    digest = _sha256(path)
    recorded = record.read_text().split() if record.exists() else []
    if recorded:  # an empty one is what a full disk or a kill left
        expected = recorded[0]
        if digest != expected:
            raise ValueError(
                f"{path} has the sha256 {digest}, but {expected} when it was first used: it has "
                f"changed or is damaged; restore it, or remove it and {record} to start anew"
            )
        return
    spec = read_source(path).spec
    variant, registers = RELEASED[name]
    found = (spec.variant, spec.patch_size, spec.num_register_tokens, spec.pos_embed_grid)
    expected = (variant, PATCH_SIZE, registers, POSITIONS)
    if found != expected:
        raise ValueError(
            f"{path} must be {name}: variant, patch size, registers and position grid {expected}, "
            f"not {found}; fetch the released file again"
        )
    with contextlib.suppress(OSError):  # a read-only cache is used as it is
        with written_beside(record, mark=f"{os.getpid()}") as beside:
            beside.write_text(f"{digest}  {record.name.removesuffix('.sha256')}\n")


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(url: str, path: pathlib.Path) -> None:
    """Fetches a file with a progress bar; a length that falls short is an OSError."""
    with urllib.request.urlopen(url, timeout=60) as response, open(path, "wb") as file:
        length = int(response.headers.get("Content-Length") or 0)
        with _progress(url.rpartition("/")[2], length) as advance:
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                advance(len(chunk))
        if length and file.tell() != length:
            raise OSError(f"it ended after {file.tell()} of {length} bytes")


@contextlib.contextmanager
def _progress(title: str, length: int) -> Iterator:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(title, total=length or None)
        yield lambda count: progress.update(task, advance=count)
