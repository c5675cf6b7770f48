"""Eight host devices for every test, and fixtures that several files share."""

import contextlib
import functools
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # none but the fixture's
# Level 0: most of a test's time is compilation, and this halves it; numbers keep their precision.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
).strip()
# gcsfs reads it when it is imported: it would ask Google what kind of bucket the emulator's is.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

import pathlib
from collections.abc import Sequence

import jax
import pytest

from dinov2_jax.cost.topology import CUDA_COMPILERS, is_installed
from dinov2_jax.workdir import workdir_path
from tests import object_store
from tests.small_run import run


@pytest.fixture
def key() -> jax.Array:
    """A jax PRNG key."""
    return jax.random.key(0)


@pytest.fixture
def libtpu():
    """Skips without the TPU's compiler; with DINOV2_JAX_REQUIRE_LIBTPU=1 (CI) that is a failure."""
    message = "NOTHING IS COMPILED FOR TPUS: pip install -e '.[test,tpu]'"
    need_compiler(("libtpu",), "LIBTPU", message)


@pytest.fixture
def cuda():
    """Likewise without the CUDA compiler; with DINOV2_JAX_REQUIRE_CUDA=1."""
    packages = f"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
    message = f"NOTHING IS COMPILED FOR GPUS: pip install --no-deps {packages}"
    need_compiler(CUDA_COMPILERS, "CUDA", message)


def need_compiler(modules: Sequence[str], name: str, message: str) -> None:
    if not any(is_installed(module) for module in modules):
        if os.environ.get(f"DINOV2_JAX_REQUIRE_{name}") == "1":
            pytest.fail(message, pytrace=False)
        pytest.skip(message)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> pathlib.Path:
    """A compilation cache that all small runs share, in this process and others."""
    directory = tmp_path_factory.mktemp("cache")
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(directory))
    jax.config.update(names[1], 0)
    yield directory
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def finished(cache, tmp_path_factory) -> pathlib.Path:
    """The workdir of an uninterrupted run in this process."""
    workdir = tmp_path_factory.mktemp("finished")
    assert run(workdir) == 0
    return workdir


@pytest.fixture(scope="session")
def buckets():
    """gs://.. or s3://.. of an emulated object store, by the kind; see `tests.object_store`."""
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())

        @functools.cache
        def url(kind: str) -> str:
            object_store.require(kind)
            address = stack.enter_context(object_store.emulator(kind))
            for name, value in object_store.environment(kind, address).items():
                patch.setenv(name, value)
            return str(workdir_path(f"{kind}://{object_store.BUCKET}"))

        yield url


@pytest.fixture
def bucket(buckets) -> str:
    """gs://.. of an emulated object store."""
    return buckets("gs")


@pytest.fixture(params=object_store.KINDS)
def any_bucket(request, buckets) -> str:
    """gs://.., then s3://.. of an emulated object store."""
    return buckets(request.param)
