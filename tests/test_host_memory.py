"""A run on one CPU keeps its memory from step to step, and leaves others' settings alone."""

import os
import pathlib
import platform
import runpy
import subprocess
import sys

import jax
import pytest

from dinov2_jax import host_memory, startup
from dinov2_jax.sharding import make_mesh
from tests.small_run import run

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")

# 64 MB of temporaries a call; faults of three calls after two.
PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from dinov2_jax import host_memory
from dinov2_jax.sharding import make_mesh
if "ready" in sys.argv:
    host_memory.compute_on_this_thread()
mesh = make_mesh(data=-1, fsdp=1, model=1, devices=jax.devices())
kept = host_memory.keep_freed_memory(mesh)
function = jax.jit(lambda x: jnp.sort(jnp.outer(x, x), axis=0).sum(0))
x = function(jnp.arange(4000.0)).block_until_ready()
host_memory.give_back()
x = function(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    x = function(x).block_until_ready()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments: str, **environment: str) -> tuple[bool, int]:
    """Whether memory is kept, and page faults of a process without settings but these."""
    clean = {key: x for key, x in os.environ.items() if key not in host_memory.VARIABLES}
    clean |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | environment
    command = [sys.executable, "-c", PROGRAM, *arguments]
    out = subprocess.run(command, env=clean, check=True, capture_output=True, text=True).stdout
    kept, count = out.split()
    return kept == "True", int(count)


@needs_glibc
def test_kept_memory_is_not_asked_for_again():
    if "[always]" in pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("this system gives large pages to all: there are few faults to count")
    kept, count = faults("ready")
    others_kept, others = faults()
    assert kept and not others_kept
    assert others > 3 * 64_000_000 // os.sysconf("SC_PAGE_SIZE") / 2
    assert count < others / 4


@needs_glibc
@pytest.mark.parametrize(
    "variables",
    [
        {"GLIBC_TUNABLES": ""},
        {"MALLOC_MMAP_MAX_": "65536"},
        {"JAX_CPU_ENABLE_ASYNC_DISPATCH": "true"},
        {"JAX_NUM_PROCESSES": "1"},
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    ],
    ids=["tunables", "variable", "jax", "processes", "devices"],
)
def test_what_is_chosen_is_left_alone(variables):
    assert not faults("ready", **variables)[0]


def test_other_libraries_processes_need_no_jax():
    program = "import sys; from dinov2_jax import host_memory; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_process_that_did_not_say_so_is_left_alone():
    mesh = make_mesh(data=1, fsdp=1, model=1, devices=jax.devices()[:1])
    assert not host_memory.keep_freed_memory(mesh)


def test_the_command_is_such_a_process(monkeypatch, capsys):
    called = []
    monkeypatch.setattr(host_memory, "compute_on_this_thread", lambda: called.append(True))
    monkeypatch.setattr("sys.argv", ["train", "--help"])
    monkeypatch.delitem(sys.modules, "dinov2_jax.train")
    with pytest.raises(SystemExit):
        runpy.run_module("dinov2_jax.train", run_name="__main__")
    assert called == [True]


def test_a_run_keeps_that_of_its_mesh_and_gives_back_the_compilers(cache, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(host_memory, "keep_freed_memory", lambda mesh: said.append(mesh.size))
    monkeypatch.setattr(host_memory, "give_back", lambda: said.append("compiled"))
    monkeypatch.setattr(startup, "build_trainer", _and_say(startup.build_trainer, said))
    assert run(tmp_path, total_steps=1, mesh__data=1) == 0
    # Once the step is compiled, and after the evaluations before and after it.
    assert said == [1, "built", *["compiled"] * 3]


def _and_say(function, said: list):
    def wrapped(*args, **kwargs):
        said.append("built")
        return function(*args, **kwargs)

    return wrapped
