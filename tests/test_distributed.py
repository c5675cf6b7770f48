"""Which environments are taken for one process of several, and what a single process does."""

import numpy as np
import pytest
from jax._src.clusters import cloud_tpu_cluster

from dinov2_jax import distributed
from dinov2_jax.distributed import HostError, LostHostError, detect

SLURM = dict(
    SLURM_JOB_ID="7",
    SLURM_STEP_NODELIST="node[1-4]",
    SLURM_NTASKS="4",
    SLURM_PROCID="1",
    SLURM_LOCALID="0",
)
OPENMPI = dict(OMPI_MCA_orte_hnp_uri="1.0;tcp://a:1", OMPI_COMM_WORLD_SIZE="2")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (
            dict(JAX_COORDINATOR_ADDRESS="h:1", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1", **SLURM),
            dict(
                coordinator_address="h:1",
                num_processes=2,
                process_id=1,
                cluster_detection_method="deactivate",
            ),
        ),
        (SLURM, dict(cluster_detection_method="slurm")),
        (SLURM | dict(SLURM_NTASKS="1"), None),
        # Another address than that of the first node.
        (SLURM | dict(JAX_COORDINATOR_ADDRESS="h:1"), dict(cluster_detection_method="slurm")),
        (SLURM | dict(SLURM_NTASKS="1", JAX_COORDINATOR_ADDRESS="h:1"), None),
        # `salloc` without `srun`: no step.
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None),
        # One GPU a task is JAX's own rule; a task alone on its node gets all of them.
        (
            SLURM | dict(SLURM_STEP_TASKS_PER_NODE="1(x4)"),
            dict(cluster_detection_method="slurm", local_device_ids=[]),
        ),
        *(
            (SLURM | dict(SLURM_STEP_TASKS_PER_NODE=tasks), dict(cluster_detection_method="slurm"))
            for tasks in ("8(x4)", "1(x3),8", "16(x4)")
        ),
        (
            SLURM | dict(SLURM_STEP_TASKS_PER_NODE="1(x4)", JAX_LOCAL_DEVICE_IDS="2,3"),
            dict(cluster_detection_method="slurm"),
        ),
        (
            OPENMPI | dict(OMPI_COMM_WORLD_LOCAL_SIZE="2"),
            dict(cluster_detection_method="ompi"),
        ),
        (
            OPENMPI | dict(OMPI_COMM_WORLD_LOCAL_SIZE="1"),
            dict(cluster_detection_method="ompi", local_device_ids=[]),
        ),
        (
            OPENMPI | dict(OMPI_COMM_WORLD_LOCAL_SIZE="1", JAX_LOCAL_DEVICE_IDS="2,3"),
            dict(cluster_detection_method="ompi"),
        ),
        # `mpirun` starts its daemons by `srun`: tasks of SLURM, of one number a node.
        (
            OPENMPI | SLURM,
            dict(cluster_detection_method="ompi"),
        ),
        (OPENMPI | dict(OMPI_COMM_WORLD_SIZE="1"), None),
        (OPENMPI | dict(OMPI_COMM_WORLD_SIZE="1", JAX_COORDINATOR_ADDRESS="h:1"), None),
        (dict(KUBERNETES_SERVICE_HOST="10.0.0.1"), None),  # a notebook in a cluster
    ],
)
def test_detect(environ, expected):
    assert detect(environ, has_tpu=False) == expected


def test_an_indexed_job_of_kubernetes(monkeypatch):
    pod = dict(KUBERNETES_SERVICE_HOST="10.0.0.1", JOB_COMPLETION_INDEX="0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "kubernetes")
    assert detect(pod, has_tpu=False) == dict(cluster_detection_method="k8s")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HostError, match=r"pip install 'jax\[k8s\]', or use --distributed=off"):
        detect(pod, has_tpu=False)


def test_openmpi_5_is_told_what_to_set():
    """It does not have the address of 4; each process would take itself for the only one."""
    with pytest.raises(HostError, match=r"JAX_PROCESS_ID=\$OMPI_COMM_WORLD_RANK, or --distributed"):
        detect(dict(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="1"), has_tpu=False)
    assert detect(dict(OMPI_COMM_WORLD_SIZE="1"), has_tpu=False) is None


def test_a_cloud_tpu_needs_no_arguments():
    assert detect({}, has_tpu=True) == {}
    assert detect(SLURM, has_tpu=True) == {}


@pytest.fixture
def tpu_machine(monkeypatch):
    """A machine with chips, as jax and we see it, whose metadata answer with a code: `ask(code)`.

    None: they do not answer.
    """
    for name in (*SLURM, *distributed._OF_SEVERAL, "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed, "has_cloud_tpu", lambda: True)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)

    def ask(code: int | None):
        def get_metadata(key):
            if code is None:
                raise OSError("metadata.google.internal does not answer")
            return "", code

        monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", get_metadata)

    ask(None)
    return ask


@pytest.fixture
def joined(monkeypatch):
    """The arguments of every attempt to join others."""
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda **kwargs: calls.append(kwargs))
    monkeypatch.setattr(distributed.alarm, "watch", lambda: None)
    return calls


@pytest.mark.parametrize(
    "environ",
    [
        dict(TPU_SKIP_MDS_QUERY="1"),
        dict(TPU_WORKER_HOSTNAMES="localhost"),
        dict(TPU_PROCESS_ADDRESSES="local", TPU_WORKER_HOSTNAMES="localhost"),
    ],
    ids=["no metadata", "its own name", "kaggle"],
)
def test_a_lone_tpu_is_a_single_process(environ, tpu_machine, joined, monkeypatch):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    distributed.initialize("auto")
    assert joined == []
    distributed.initialize("on")
    assert joined == [{}]


def test_a_lone_tpu_by_its_metadata(tpu_machine, joined):
    tpu_machine(404)
    distributed.initialize("auto")
    assert joined == []


def test_a_lone_tpu_is_not_told_to_be_several(tpu_machine, monkeypatch):
    """By jax itself, which finds no cluster."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    distributed.initialize("auto")
    with pytest.raises(LostHostError, match="coordinator_address should be defined"):
        distributed.initialize("on")


@pytest.mark.parametrize(
    "environ",
    [
        dict(TPU_WORKER_HOSTNAMES="a,b"),
        dict(TPU_PROCESS_ADDRESSES="a:1,b:1", TPU_WORKER_HOSTNAMES="localhost"),
        dict(TPU_WORKER_HOSTNAMES="localhost", MEGASCALE_NUM_SLICES="2"),
        dict(TPU_SKIP_MDS_QUERY="1", MEGASCALE_COORDINATOR_ADDRESS="a:1"),
        dict(TPU_SKIP_MDS_QUERY="1", JOB_COMPLETION_INDEX="0"),
        dict(TPU_SKIP_MDS_QUERY="1", OMPI_COMM_WORLD_SIZE="2"),
        dict(TPU_SKIP_MDS_QUERY="1", JAX_COORDINATOR_ADDRESS="a:1"),
        dict(TPU_SKIP_MDS_QUERY="1", **SLURM),
    ],
)
def test_a_tpu_of_several_hosts_joins_them(environ, tpu_machine, joined, monkeypatch):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    distributed.initialize("auto")
    assert joined == [{}]


def test_a_tpu_whose_metadata_know_it_joins_the_others(tpu_machine, joined):
    tpu_machine(200)
    distributed.initialize("auto")
    assert joined == [{}]


def test_a_tpu_that_cannot_find_out_does_not_train_alone(tpu_machine, joined):
    with pytest.raises(LostHostError, match=r"does not answer.*--distributed=off for a single one"):
        distributed.initialize("auto")
    assert joined == []


def test_a_tpu_whose_library_knows_more_hosts_does_not_train_alone(
    tpu_machine, joined, monkeypatch
):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setattr("jax.process_count", lambda: 4)
    with pytest.raises(HostError, match=r"one of 4 hosts of a TPU, but nothing says .*; set TPU"):
        distributed.initialize("auto")


def test_half_an_environment_is_refused():
    for name in ("JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS"):
        with pytest.raises(HostError, match=f"^{name} without the others; set .*distributed=off"):
            detect({name: "2"}, has_tpu=False)
    wrong = dict(JAX_COORDINATOR_ADDRESS="h:1", JAX_NUM_PROCESSES="two", JAX_PROCESS_ID="0")
    with pytest.raises(HostError, match=r"must be whole numbers .*'two'"):
        detect(wrong, has_tpu=False)


def test_a_laptop_is_left_alone(monkeypatch):
    def initialize(**_):
        raise AssertionError("there is nobody to join")

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    monkeypatch.setattr(distributed, "has_cloud_tpu", lambda: False)
    for name in (*SLURM, "JAX_COORDINATOR_ADDRESS", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    distributed.initialize("auto")
    distributed.initialize("off")
    message = "nothing says where the other processes are.* single process needs --distributed=auto"
    with pytest.raises(HostError, match=message):
        distributed.initialize("on")
    with pytest.raises(HostError, match="--distributed=maybe must be one of auto, on, off"):
        distributed.initialize("maybe")


def test_joining_again_is_nothing(monkeypatch):
    """Every entry of a suite asks for it; jax refuses a second time."""

    def initialize(**_):
        raise RuntimeError("initialize should only be called once")

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "has_cloud_tpu", lambda: True)
    distributed.initialize("on")


def test_others_that_do_not_come_are_one_line(monkeypatch):
    def initialize(**_):
        raise RuntimeError("Barrier timed out.\nWaited 300 s.")

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    monkeypatch.setattr(distributed, "has_cloud_tpu", lambda: True)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    with pytest.raises(
        LostHostError, match=r"did not find each other \(Barrier timed out\. Waited"
    ):
        distributed.initialize("auto")


def test_a_failure_anywhere_stops_every_process(monkeypatch):
    """As the second of two processes hears it."""
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr(distributed, "meet", lambda: None)
    said = []

    def gather(own):
        said.append(int(own))
        return np.array([1, own])

    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", gather)
    with pytest.raises(
        HostError, match="process 0 could not go on; its own message says why"
    ) as info:
        distributed.together(lambda: "fine here")
    assert info.type is HostError
    with pytest.raises(OSError, match="full"):
        distributed.together(lambda: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(ValueError, match="wrong"):
        distributed.together(lambda: (_ for _ in ()).throw(ValueError("wrong")))
    assert said == [0, 2, 1]
    # By what may pass: a later start may succeed.
    monkeypatch.setattr(
        distributed.multihost_utils, "process_allgather", lambda own: np.array([2, own])
    )
    with pytest.raises(LostHostError, match="process 0 could not go on"):
        distributed.together(lambda: "fine here")
    monkeypatch.setattr(
        distributed.multihost_utils, "process_allgather", lambda own: np.array([0, own])
    )
    assert distributed.together(lambda: "fine") == "fine"


def test_the_primary_process_fails_with_its_own_error():
    done = []
    assert distributed.on_primary(lambda: done.append(1) or "done") == "done"
    assert done == [1]
    with pytest.raises(OSError, match="full"):
        distributed.on_primary(lambda: (_ for _ in ()).throw(OSError("full")))
