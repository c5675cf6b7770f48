"""What a store must be before a run trusts it: reached by every client, and known to Orbax."""

import pytest
import tensorstore
from etils import epath
from orbax.checkpoint._src.path import atomicity_defaults, gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from dinov2_jax import object_stores
from dinov2_jax.faults import PassingFault
from dinov2_jax.object_stores import StoreError, check_access, s3_driver
from dinov2_jax.workdir import WorkdirError, open_workdir

VARIABLES = (
    "AWS_ENDPOINT_URL_S3 AWS_ENDPOINT_URL AWS_REGION AWS_DEFAULT_REGION AWS_ACCESS_KEY_ID".split()
)


def test_the_driver_goes_by_the_variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    plain = {"driver": "s3", "bucket": "bucket", "path": "a/b"}
    assert s3_driver("s3://bucket/a/b") == plain
    monkeypatch.setenv("AWS_REGION", "eu-west-1")  # the machine's: the bucket's may be another
    assert s3_driver("s3://bucket/a/b") == plain
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ada")
    more = {"endpoint": "http://127.0.0.1:1", "aws_credentials": {"type": "environment"}}
    assert s3_driver("s3://bucket/a/b") == plain | more
    assert tensorstore.KvStore.Spec(s3_driver("s3://bucket/a/b")).path == "a/b"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:2")
    assert s3_driver("s3://bucket/a/b")["endpoint"] == "http://127.0.0.1:2"


def test_the_check_leaves_its_probe_alone(any_bucket, tmp_path):
    workdir = epath.Path(any_bucket) / tmp_path.name
    check_access(workdir, probe=".lock")
    assert [path.name for path in workdir.iterdir()] == [".lock"]


def test_a_store_that_only_one_client_reaches_is_refused(buckets, tmp_path, monkeypatch):
    """s3fs remembers the emulator; TensorStore is sent to where nobody listens."""
    workdir = epath.Path(buckets("s3")) / tmp_path.name
    check_access(workdir, probe=".lock")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(
        PassingFault, match=r"cannot be used \(.*127.0.0.1 port 9.*AWS_ENDPOINT_URL"
    ):
        with open_workdir(workdir):
            pass


def test_nothing_may_be_deleted_is_found_before_the_first_step(any_bucket, tmp_path, monkeypatch):
    workdir = epath.Path(any_bucket) / tmp_path.name

    def refuse(self, missing_ok=False):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(workdir), "unlink", refuse)
    with pytest.raises(StoreError, match=r"PermissionError: Access Denied.*[dD]elete|objects\.\*"):
        check_access(workdir, probe=".lock")


@pytest.mark.parametrize(
    ("error", "kind"),
    [(TimeoutError("no answer"), PassingFault), (PermissionError("denied"), WorkdirError)],
)
def test_a_store_that_does_not_answer_may_later(any_bucket, tmp_path, monkeypatch, error, kind):
    """Restarted (exit code 1), where a refusal is not (2)."""
    workdir = epath.Path(any_bucket) / tmp_path.name

    def fail(self, text):
        raise error

    monkeypatch.setattr(type(workdir), "write_text", fail)
    with pytest.raises(kind, match=f"cannot be used .*{error}.*create the bucket"):
        with open_workdir(workdir):
            pass


@pytest.mark.parametrize(
    "module, name", [(gcs_utils, "get_kvstore_for_gcs"), (tensorstore_utils, "_use_gcs_driver")]
)
def test_an_orbax_that_cannot_be_taught_is_refused(monkeypatch, module, name):
    monkeypatch.delattr(module, name)
    with pytest.raises(StoreError, match=f"{name}.*pip install 'orbax-checkpoint==0.12.8'"):
        object_stores._teach_orbax_s3.__wrapped__()


def test_an_orbax_that_does_not_listen_is_refused(monkeypatch):
    """One that has the functions still, but asks others."""
    taught = {
        tensorstore_utils: ("_normalize_path", "_use_gcs_driver"),
        gcs_utils: ("get_kvstore_for_gcs",),
        atomicity_defaults: (
            "get_default_temporary_path_class",
            "get_item_default_temporary_path_class",
        ),
    }
    for module, names in taught.items():  # put back after the test
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))
    driver = {"driver": "file", "path": "/"}
    monkeypatch.setattr(tensorstore_utils, "build_kvstore_tspec", lambda *_, **__: driver)
    with pytest.raises(StoreError, match="'driver': 'file'"):
        object_stores._teach_orbax_s3.__wrapped__()
