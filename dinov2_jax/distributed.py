"""Several processes as one run: how they find each other, wait for each other, and who writes.

Every process runs the same program on its own devices; arrays are global. What they tell each other
while they train: `exchange`, and where one fails alone: `alarm`.
"""

import hashlib
import importlib.util
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dinov2_jax import alarm

MODES = ("auto", "on", "off")
# What a launcher sets where nothing can be detected.
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Variables that name one task of SLURM among several, inside `srun`.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")

# What says of a Cloud TPU machine that there are others, even where jax makes nothing of it.
_OF_SEVERAL = (
    ADDRESS,
    "JOB_COMPLETION_INDEX",
    "MEGASCALE_COORDINATOR_ADDRESS",
    "MEGASCALE_NUM_SLICES",
    "OMPI_COMM_WORLD_SIZE",
)
# Its list of hosts where it is the only one.
_ITSELF = ("local", "localhost")

Result = TypeVar("Result")

_MEETINGS = itertools.count()  # every meeting needs a name of its own
_MEETING_SECS = 3600
_FAILING_SECS = 60  # between the processes that fail in the same


class HostError(RuntimeError):
    """Hosts that cannot work together; its text is one line for the user."""


class LostHostError(HostError):
    """Hosts that did not come, or failed by what may pass: the command may succeed later."""


def detect(environ: Mapping[str, str], *, has_tpu: bool) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize` for this environment; None: a single process.

    Args:
      environ: environment variables.
      has_tpu: whether this is a Cloud TPU machine (`has_cloud_tpu`).

    Raises:
      HostError: the variables are there in part, or are no numbers; or what finds the others by
        them is missing.
    """
    given = [name for name in (ADDRESS, COUNT, INDEX) if environ.get(name)]
    cure = f"set {ADDRESS}, {COUNT} and {INDEX} together, or --distributed=off"
    if COUNT in given or INDEX in given:
        if len(given) < 3:
            raise HostError(f"{' and '.join(given)} without the others; {cure}")
        try:
            count, index = int(environ[COUNT]), int(environ[INDEX])
        except ValueError as error:
            raise HostError(f"{COUNT} and {INDEX} must be whole numbers ({error})") from error
        return {
            "coordinator_address": environ[ADDRESS],
            "num_processes": count,
            "process_id": index,
            "cluster_detection_method": "deactivate",
        }
    if has_tpu:
        return {}
    # Before SLURM, whose variables it hands down to what it starts on other nodes.
    if int(environ.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        if not environ.get("OMPI_MCA_orte_hnp_uri"):
            raise HostError(
                f"OpenMPI 5 does not say where the first process is; set {ADDRESS} (its host:port) "
                f"and, in each process, {COUNT}=$OMPI_COMM_WORLD_SIZE and "
                f"{INDEX}=$OMPI_COMM_WORLD_RANK, or --distributed=off"
            )
        is_alone = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
        return {"cluster_detection_method": "ompi", **_local_devices(environ, is_alone=is_alone)}
    if all(environ.get(name) for name in _SLURM) and int(environ["SLURM_NTASKS"]) > 1:
        tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_NTASKS_PER_NODE", "")
        is_alone = re.fullmatch(r"1(\(x\d+\))?", tasks) is not None
        return {"cluster_detection_method": "slurm", **_local_devices(environ, is_alone=is_alone)}
    if environ.get("KUBERNETES_SERVICE_HOST") and environ.get("JOB_COMPLETION_INDEX"):
        if importlib.util.find_spec("kubernetes") is None:
            raise HostError(
                "a pod of an indexed Kubernetes Job finds the others by a package that is not "
                "installed; pip install 'jax[k8s]', or use --distributed=off for a single pod"
            )
        return {"cluster_detection_method": "k8s"}
    # Beside a cluster's variables the address alone names another port or host; here it is a start
    # whose other half is missing, unless a launcher says that it has started one process.
    if given and "1" not in (environ.get("SLURM_NTASKS"), environ.get("OMPI_COMM_WORLD_SIZE")):
        raise HostError(f"{ADDRESS} without the others; {cure}")
    return None


def _local_devices(environ: Mapping[str, str], *, is_alone: bool) -> dict[str, Any]:
    # JAX would give a process of OpenMPI or SLURM one GPU. An empty list cuts none off: one that is
    # alone on its node gets them all, and nobody has to count them.
    is_chosen = bool(environ.get("JAX_LOCAL_DEVICE_IDS"))
    return {"local_device_ids": []} if is_alone and not is_chosen else {}


def has_cloud_tpu() -> bool:
    """Whether this machine has TPU chips and the library that drives them."""
    if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("tpu", ""):
        return False
    chips = [*pathlib.Path("/dev").glob("accel*"), *pathlib.Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def is_lone_tpu(environ: Mapping[str, str]) -> bool:
    """Whether it is clear that a Cloud TPU machine has no others beside it.

    It is where the list of hosts is this very machine (Kaggle), and where jax knows no cluster:
    there is no such list, and no metadata of a TPU, or none that may be asked (a container).

    Args:
      environ: environment variables.

    Raises:
      Exception: whatever jax raises where it cannot tell, such as of metadata that do not answer.
    """
    if any(environ.get(name) for name in _OF_SEVERAL):
        return False
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if hosts:
        return hosts in _ITSELF
    # How jax decides whether there is a cluster has no public door in jax 0.10; imported here, so
    # that a release which moves it is felt on such machines alone.
    from jax._src.clusters import ClusterEnv

    kinds = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
    return not any(kind.is_env_present() for kind in kinds)


def initialize(mode: str = "auto") -> None:
    """Joins the other processes of this run, if there are any. Before any other use of jax.

    Once joined, they stay so: a later call finds that and returns. One that fails alone ends all
    by `alarm.ring`.

    Args:
      mode: "auto" joins where the environment says that there are others (Cloud TPU, SLURM,
        OpenMPI, an indexed Kubernetes Job, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
        JAX_PROCESS_ID), and a Cloud TPU machine unless it clearly is the only one; "on" must find
        them; "off" never looks.

    Raises:
      HostError: nothing says where they are, though it must or the TPU has more hosts, or an
        unknown mode; `LostHostError`: out of reach.
    """
    if mode not in MODES:
        raise HostError(f"--distributed={mode} must be one of {', '.join(MODES)}")
    if mode == "off" or jax.distributed.is_initialized():
        return
    arguments = detect(os.environ, has_tpu=has_cloud_tpu())
    if arguments is None:
        if mode == "auto":
            return
        raise HostError(
            "--distributed=on, but nothing says where the other processes are: start them by "
            f"SLURM, OpenMPI, Kubernetes or on Cloud TPU, or set {ADDRESS}, {COUNT} and {INDEX}; "
            "a single process needs --distributed=auto"
        )
    try:
        is_lone = mode == "auto" and arguments == {} and is_lone_tpu(os.environ)
        if not is_lone:
            jax.distributed.initialize(**arguments)
    # Whatever the cluster's services raise: RuntimeError, ValueError, OSError, grpc's own.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise LostHostError(
            f"the processes of this run did not find each other ({reason}); check that all were "
            "started, or use --distributed=off for a single one"
        ) from error
    if not is_lone:
        alarm.watch()
    elif (count := jax.process_count()) > 1:  # the TPU's own library knows its hosts
        raise HostError(
            f"this is one of {count} hosts of a TPU, but nothing says where the others are; set "
            f"TPU_WORKER_HOSTNAMES and TPU_WORKER_ID, or {ADDRESS}, {COUNT} and {INDEX}"
        )


def is_primary() -> bool:
    """Whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


def meet(secs: int = _MEETING_SECS) -> None:
    """Waits until every process has come here, `secs` seconds at most: one may compile or read.

    By way of the coordinator: the first collective of some devices gives up after half a minute.
    """
    if jax.process_count() > 1:
        _wait_for_all(f"dinov2_jax meets {next(_MEETINGS)}", secs)


def check_all_failed(what: str, error: Exception) -> None:
    """Returns where every process has failed in the same: all may go on with something else.

    Args:
      what: it was; a name of its own.
      error: of this process.

    Raises:
      HostError: another did not fail, and waits for this process: the run must end.
    """
    if jax.process_count() == 1:
        return
    try:
        _wait_for_all(f"dinov2_jax fails {what}", _FAILING_SECS)
    # Whatever the coordinator's client raises.
    except Exception as timeout:
        raise HostError(f"{what} failed, but not on all processes: {error}") from timeout


def _wait_for_all(name: str, secs: int) -> None:
    from orbax.checkpoint import multihost

    multihost.sync_global_processes(name, processes=set(range(jax.process_count())), timeout=secs)


def together(action: Callable[[], Result]) -> Result:
    """Runs an action on every process; none goes on unless all could.

    Returns:
      What the action returned on this process.

    Raises:
      HostError: on the processes where it succeeded, if it failed on another; `LostHostError` if by
        an OSError, such as of an object store. Where it failed, its own error.
    """
    result = error = None
    try:
        result = action()
    except Exception as raised:
        error = raised
    if jax.process_count() > 1:
        meet()
        own = int(error is not None) + int(isinstance(error, OSError))
        failures = multihost_utils.process_allgather(np.int32(own))
        if failures.any() and error is None:
            kind = LostHostError if failures.max() > 1 else HostError
            raise kind(f"process {failures.argmax()} could not go on; its own message says why")
    if error is not None:
        raise error
    return result


def on_primary(action: Callable[[], Result]) -> Result | None:
    """Like `together`, for what the primary process alone does; the others get None."""
    return together(action if is_primary() else lambda: None)


def check_same(what: str, text: str) -> None:
    """Checks that every process has the same text, such as its configuration.

    Raises:
      HostError: on every process, if one differs.
    """
    if jax.process_count() == 1:
        return
    meet()
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32)
    digests = multihost_utils.process_allgather(digest)
    different = [i for i, row in enumerate(digests) if (row != digests[0]).any()]
    if different:
        raise HostError(
            f"processes {different} have another {what} than process 0; start all with the same "
            "command, code and data"
        )


def fetch(tree: Any) -> Any:
    """A tree of global arrays as numpy, whole, on every process: all of them must call it."""

    def fetch_leaf(leaf: jax.Array) -> np.ndarray:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return jax.device_get(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(fetch_leaf, tree)
