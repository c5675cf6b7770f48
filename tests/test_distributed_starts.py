"""Two processes with the variables of SLURM or OpenMPI join by jax itself, and take all GPUs."""

import json

import pytest

from tests.two_processes import run_two

# {}: the number of the process. The address is given: loopback, at a free port.
STARTS = {
    "slurm": dict(
        SLURM_JOB_ID="7",
        SLURM_STEP_NODELIST="node[1-2]",
        SLURM_STEP_TASKS_PER_NODE="1(x2)",
        SLURM_NTASKS="2",
        SLURM_PROCID="{}",
        SLURM_LOCALID="0",
    ),
    "openmpi": dict(
        OMPI_MCA_orte_hnp_uri="1.0;tcp://a:1",
        OMPI_COMM_WORLD_SIZE="2",
        OMPI_COMM_WORLD_RANK="{}",
        OMPI_COMM_WORLD_LOCAL_SIZE="1",
        OMPI_COMM_WORLD_LOCAL_RANK="0",
    ),
}
PROGRAM = """
import json, os, sys
index = os.environ.pop("JAX_PROCESS_ID")
del os.environ["JAX_NUM_PROCESSES"]
os.environ |= {name: value.format(index) for name, value in json.loads(sys.argv[1]).items()}
import jax
from dinov2_jax import distributed
distributed.initialize("on")
gpus = jax.config.read("jax_cuda_visible_devices")
print("I am", jax.process_index(), "of", jax.process_count(), "with", gpus)
distributed.meet()
"""


@pytest.mark.parametrize("start", STARTS)
def test_a_process_alone_on_its_node_takes_all_gpus(start):
    codes, said = run_two(PROGRAM, json.dumps(STARTS[start]))
    assert codes == [0, 0], said
    for index, words in enumerate(said):
        assert f"I am {index} of 2 with all" in words
