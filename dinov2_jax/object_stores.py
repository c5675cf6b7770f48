"""Object stores that a workdir may be at: gs:// and s3://. What they need, and what Orbax needs.

Orbax 0.12 writes to gs:// but not to s3:// (google/orbax issue 359), though TensorStore below it
has a driver for both, and the file that marks a complete step at gs:// does so anywhere.
"""

import functools
import importlib
import os
import secrets
from typing import Any

from etils import epath

# What a kind of URL needs, its extra, and how access to it is got.
_PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
_CURES = {
    "gs": "log in (gcloud auth application-default login), or have somebody give this account "
    "storage.objects.* and storage.buckets.get on it",
    "s3": "log in (aws configure, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), name the store "
    "if it is not Amazon's (AWS_ENDPOINT_URL), or have somebody give this account s3:ListBucket, "
    "s3:GetObject, s3:PutObject and s3:DeleteObject on it",
}

_NOT_TAUGHT = (
    "needs a version of orbax-checkpoint that can be taught s3:// ({}); "
    "pip install 'orbax-checkpoint==0.12.8'"
)
_DRIVER_SECS = 60.0


class StoreError(RuntimeError):
    """A store that cannot be used; its text says why and what would help."""


def prepare(url: str) -> None:
    """Makes every client of a store ready; every process must do it.

    Raises:
      StoreError: another kind of URL, or the package for it is missing.
    """
    kind = url.partition("://")[0]
    if kind not in _PACKAGES:
        raise StoreError("must be a folder or at gs:// or s3://: checkpoints go to no other store")
    package, extra = _PACKAGES[kind]
    try:
        import fsspec

        importlib.import_module(package)
    except ImportError as error:
        raise StoreError(
            f"needs {package}, which is not installed; pip install 'dinov2_jax[{extra}]'"
        ) from error
    # Other processes write here too: what was listed once may have changed since.
    fsspec.config.conf.setdefault(kind, {})["use_listings_cache"] = False
    # TensorFlow, where it happens to be installed, would be asked instead of fsspec.
    os.environ.setdefault("EPATH_USE_TF", "false")
    if kind == "s3":
        _teach_orbax_s3()


def check_access(workdir: epath.Path, *, probe: str) -> None:
    """Finds out whether a bucket is there, may be listed, written and cleared; leaves `probe`.

    By every client that will: Orbax's drivers have logins and endpoints of their own.

    Raises:
      StoreError: it may not; whether that may pass, its cause says (`faults.may_pass`).
    """
    kind, _, path = str(workdir).partition("://")
    try:
        if kind == "gs":  # Orbax asks the bucket what kind it is
            from google.cloud import storage

            storage.Client().get_bucket(path.partition("/")[0])
        (workdir / probe).write_text(secrets.token_hex())
        list(workdir.iterdir())
        second = workdir / f"{probe}.{secrets.token_hex()}"
        second.write_text("")
        second.unlink()
        if kind == "s3":
            _check_driver(str(workdir), key=second.name)
    # No credentials, no bucket, no permission, no network: each client raises kinds of its own.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise StoreError(f"cannot be used ({reason}); create the bucket, {_CURES[kind]}") from error


def _check_driver(url: str, *, key: str) -> None:
    """Writes, reads, lists and deletes an object as Orbax will."""
    import tensorstore

    # By default it tries for minutes.
    spec = s3_driver(f"{url}/") | {"s3_request_retries": {"max_retries": 2}}
    only = tensorstore.KvStore.KeyRange(key, key + "\0")  # not all that the workdir has
    try:
        store = tensorstore.KvStore.open(spec).result(timeout=_DRIVER_SECS)
        store.write(key, b"1").result(timeout=_DRIVER_SECS)
        read = store.read(key).result(timeout=_DRIVER_SECS).value
        listed = store.list(only).result(timeout=_DRIVER_SECS)
        store.delete_range(only).result(timeout=_DRIVER_SECS)
    except TimeoutError as error:
        raise TimeoutError(f"TensorStore found no answer in {_DRIVER_SECS:.0f} s") from error
    if read != b"1" or key.encode() not in listed:
        raise OSError(f"TensorStore does not find what it wrote: {read}")


def s3_driver(url: str) -> dict[str, Any]:
    """TensorStore's specification of s3://bucket/path.

    It asks the store for the bucket's region: the variables name the machine's.
    """
    bucket, _, path = url.removeprefix("s3://").partition("/")
    spec = {"driver": "s3", "bucket": bucket, "path": path}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        spec["endpoint"] = endpoint
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        # Not by the whole chain, whose every step that finds nothing prints an error.
        spec["aws_credentials"] = {"type": "environment"}
    return spec


@functools.cache
def _teach_orbax_s3() -> None:
    """Makes Orbax treat s3:// as it treats gs://, in the functions that ask for gs:// alone.

    They are not public: a version of Orbax that does not ask them is refused, and one that knows
    s3:// by itself makes this function needless.
    """
    try:
        from orbax.checkpoint._src.path import atomicity, atomicity_defaults, gcs_utils
        from orbax.checkpoint._src.serialization import tensorstore_utils

        normalize, driver = tensorstore_utils._normalize_path, gcs_utils.get_kvstore_for_gcs
        uses_driver = tensorstore_utils._use_gcs_driver
        names = ("get_default_temporary_path_class", "get_item_default_temporary_path_class")
        classes = {name: getattr(atomicity_defaults, name) for name in names}
    except (ImportError, AttributeError) as error:
        raise StoreError(_NOT_TAUGHT.format(error)) from error

    def is_s3(path) -> bool:
        return str(path).startswith("s3://")

    def temporary_path_class(default, path, **options):
        # No rename: a step is complete by its last object, as at gs://.
        return atomicity.CommitFileTemporaryPath if is_s3(path) else default(path, **options)

    tensorstore_utils._normalize_path = lambda path: normalize(path).replace("s3:/", "s3://")
    tensorstore_utils._use_gcs_driver = lambda path: is_s3(path) or uses_driver(path)
    gcs_utils.get_kvstore_for_gcs = lambda path: s3_driver(path) if is_s3(path) else driver(path)
    for name, default in classes.items():
        setattr(atomicity_defaults, name, functools.partial(temporary_path_class, default))
    spec = tensorstore_utils.build_kvstore_tspec("s3://bucket/path", use_ocdbt=False)
    if spec.get("driver") != "s3":
        raise StoreError(_NOT_TAUGHT.format(spec))
