"""A checkpoint that only one of two processes can read: they go on alike, or end alike."""

import re

import pytest

from tests.two_processes import run_two

PROGRAM = """
import sys, time
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from dinov2_jax import commands, distributed
from dinov2_jax.checkpoints import Checkpoints, KeepPolicy
from dinov2_jax.faults import PassingFault

directory, action = sys.argv[1:]
distributed.initialize("on")
cut = NamedSharding(Mesh(np.array(jax.devices()), ("fsdp",)), PartitionSpec("fsdp"))
shape = (jax.device_count(), 1000)

def part(step):  # what does not compress is not kept within the index
    return np.random.default_rng(step).random((1, 1000), np.float32)

def state(step):
    return {"w": jax.make_array_from_callback(shape, cut, lambda _: part(step))}

def no_answer(*_, **__):
    raise ConnectionError("reset by peer")

def out_of_memory(*_, **__):
    raise ValueError("RESOURCE_EXHAUSTED: Out of memory")

if jax.process_index() == 1 and action == "late":
    ocp.CheckpointManager.all_steps = lambda self: [1]
elif jax.process_index() == 1 and action in globals():
    ocp.StandardCheckpointHandler.restore = globals()[action]
try:
    with Checkpoints(directory, KeepPolicy(last=3)) as checkpoints:
        if action == "save":
            for step in (1, 2):
                checkpoints.save(step, state(step), {"step": step})
            checkpoints.wait()
            sys.exit()
        wanted = {"w": jax.ShapeDtypeStruct(shape, np.float32, sharding=cut)}
        started = time.monotonic()
        step, restored, host = checkpoints.restore_latest(wanted, warn=print)
        for shard in restored["w"].addressable_shards:
            np.testing.assert_array_equal(shard.data, part(step))
        print("restored", step, host, "quickly" * (time.monotonic() - started < 20))
except (distributed.LostHostError, PassingFault) as error:
    sys.exit(commands.fail(error, 1))
"""


@pytest.fixture
def directory(tmp_path):
    """Steps 1 and 2, of which each process wrote its half."""
    directory = tmp_path / "checkpoints"
    codes, said = run_two(PROGRAM, str(directory), "save")
    assert codes == [0, 0], said
    return directory


def test_all_go_on_from_the_step_before_where_one_finds_its_part_damaged(directory):
    for path in (directory / "2" / "state" / "ocdbt.process_1" / "d").iterdir():
        path.write_bytes(b"")
    codes, said = run_two(PROGRAM, str(directory), "restore")
    assert codes == [0, 0], said
    for text in said:
        assert "restored 1 {'step': 1} quickly\n" in text
    assert "checkpoint 2 cannot be read (process 1 could not go on; its own message" in said[0]
    assert re.search(r"checkpoint 2 cannot be read \((?!process)", said[1])
    assert (directory.with_name("checkpoints_unreadable") / "2").is_dir()


@pytest.mark.parametrize(
    ("action", "reason"),
    [("no_answer", "reset by peer"), ("out_of_memory", "RESOURCE_EXHAUSTED: Out of memory")],
)
def test_all_end_where_one_may_read_it_later(directory, action, reason):
    codes, said = run_two(PROGRAM, str(directory), action)
    assert codes == [1, 1], said
    why = f"checkpoint 2 in {directory} cannot be read now ({reason}); run the same command again"
    assert f"error: process 1: {why}" in said[1]
    assert re.search("error: process 0: .*checkpoint 2", said[0])
    assert not [text for text in said if "Traceback" in text or "restored" in text]
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2"]


def test_all_end_where_one_does_not_see_the_newest(directory):
    codes, said = run_two(PROGRAM, str(directory), "late")
    assert codes == [1, 1], said
    for text in said:
        assert f"not all hosts see the same checkpoints in {directory}" in text
        assert "restored" not in text
