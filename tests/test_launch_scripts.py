"""What the launch scripts do: stand-ins for gcloud, xpk and srun keep what they are given."""

import ast
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from dinov2_jax.config import REPOSITORY
from dinov2_jax.flags import parse_flags
from dinov2_jax.train import STOPPED
from tests.test_launch import LAUNCH, jobset


def commands(tmp_path, script: str, *arguments: str, says: str = "", code=0, **environment):
    """The `gcloud` and `xpk` commands that a script runs, and its stderr; each prints `says`."""
    for name in ("gcloud", "xpk"):
        stub = tmp_path / name
        record = f'for word in {name} "$@"; do printf "%s\\0" "$word"; done; printf "\\n\\0"'
        stub.write_text(f"#!/bin/sh\necho '{says}'\n({record}) >> {tmp_path}/log\n")
        stub.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "NAME": "n", "ZONE": "z"} | environment
    environment |= {"WORKDIR": "gs://b/run 1", "CLUSTER": "c", "TPU_TYPE": "v5litepod-16"}
    done = subprocess.run(
        [LAUNCH / script, *arguments], env=environment, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == code, done.stderr
    words = (tmp_path / "log").read_text().split("\0\n\0")[:-1]
    return [line.split("\0") for line in words], done.stderr


# What a shell may change.
PATTERN = "--config.data.path=gs://b/{000..127}.tar"
FLAGS = ("--config=configs/vitg14.py", PATTERN)
# What hosts find for each other, where all of them can write.
SHARED = {
    "DINOV2_JAX_TAR_INDEX": "gs://b/run 1/tar_index",
    "JAX_COMPILATION_CACHE_DIR": "gs://b/run 1/compiled",
}


def test_the_hosts_of_a_jobset_share_index_and_programs():
    (replicated,) = jobset()["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    workdir = parse_flags(container["args"]).workdir
    shared = {variable["name"]: variable["value"] for variable in container["env"]}
    assert shared == {
        name: value.replace("gs://b/run 1", workdir) for name, value in SHARED.items()
    }


def test_tpu_vm_runs_the_flags_as_they_are_and_stops_nothing_but_the_run(tmp_path):
    ((*_, run),), _ = commands(tmp_path, "tpu_vm.sh", "run", *FLAGS)
    words = shlex.split(run)
    assert {f"{name}={value}" for name, value in SHARED.items()} < set(words)
    assert "--workdir=gs://b/run 1" in words
    # Added to the log: what a run that has failed said is read after the next has begun.
    assert words[words.index(">>") + 1] == "~/train.log" and ">" not in words
    assert parse_flags(words[words.index("dinov2_jax.train") + 1 : words.index(">>")]).overrides
    (tmp_path / "log").unlink()
    ((*_, stop),), _ = commands(tmp_path, "tpu_vm.sh", "stop")
    pattern = shlex.split(stop)[3]
    assert re.search(pattern, run) and not re.search(pattern, stop)


def test_tpu_vm_runs_nothing_without_flags(tmp_path):
    (tmp_path / "log").touch()
    found, error = commands(tmp_path, "tpu_vm.sh", "run", code=2)
    assert not found and "run FLAGS" in error and "needs --config" in error


def test_tpu_vm_installs_what_the_image_has_for_a_python_that_the_package_allows(tmp_path):
    (copy, (*_, setup)), _ = commands(tmp_path, "tpu_vm.sh", "setup")
    assert "scp" in copy
    (version,) = re.findall(r"--python (3\.\d+)", setup)
    assert f'python_requires=">={version}"' in (REPOSITORY / "setup.py").read_text()
    image = (LAUNCH / "Dockerfile").read_text()
    assert f"FROM python:{version}-" in image
    (extras,) = re.findall(r"/dinov2_jax\[([\w,]+)\]'$", setup)
    assert extras == re.search(r'extras="([^"]+)"', image)[1] + ",tpu"


@pytest.mark.parametrize("queued", [{}, {"QUEUED": "1"}], ids=["at once", "queued"])
@pytest.mark.parametrize(
    ("accelerator", "version"),
    [
        ("v4-512", "tpu-ubuntu2204-base"),
        ("v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-256", "v2-alpha-tpuv6e"),
    ],
)
def test_the_software_is_that_of_the_accelerator(tmp_path, accelerator, version, queued):
    wanted = dict(ACCELERATOR=accelerator, says="ACTIVE", **queued)
    (words, *_), _ = commands(tmp_path, "tpu_vm.sh", "create", **wanted)
    assert {accelerator, version} < set(words)
    (tmp_path / "log").unlink()
    (words, *_), _ = commands(tmp_path, "tpu_vm.sh", "create", **wanted, VERSION="other")
    assert {accelerator, "other"} < set(words) and version not in words


def test_software_that_nobody_knows_must_be_given(tmp_path):
    (tmp_path / "log").touch()
    wanted = dict(ACCELERATOR="tpu7x-256", code=2)
    found, error = commands(tmp_path, "tpu_vm.sh", "create", **wanted)
    assert not found and "ACCELERATOR=tpu7x-256: set VERSION" in error
    (words,), _ = commands(tmp_path, "tpu_vm.sh", "create", ACCELERATOR="tpu7x-256", VERSION="new")
    assert {"tpu7x-256", "new"} < set(words)


def test_a_slice_that_will_not_come_is_not_waited_for(tmp_path):
    wanted = dict(ACCELERATOR="v5litepod-16", QUEUED="1")
    found, error = commands(tmp_path, "tpu_vm.sh", "create", says="FAILED", code=1, **wanted)
    assert len(found) == 2 and "n is FAILED and will not come" in error
    commands(tmp_path, "tpu_vm.sh", "create", says="ACTIVE", **wanted)


def test_xpk_passes_the_flags_as_they_are(tmp_path):
    (words,), _ = commands(tmp_path, "xpk.sh", *FLAGS)
    pairs = list(zip(words[3::2], words[4::2], strict=True))
    options = dict(pairs)
    variables = [value for option, value in pairs if option == "--env"]
    assert variables == [f"{name}={value}" for name, value in SHARED.items()]
    # As long as the other recipes give: its own 30 s are short for a large model's checkpoint.
    assert options["--termination-grace-period-seconds"] == "300"
    # 2 is not among them, nor among xpk's own: no restart cures what the command was given.
    assert options["--restart-on-exit-codes"] == str(STOPPED)
    assert int(options["--max-restarts"]) > 0
    words = shlex.split(options["--command"])
    assert words[:3] == ["python", "-m", "dinov2_jax.train"] and words[-2:] == list(FLAGS)
    assert parse_flags(words[3:]).overrides


def submitted(tmp_path, *flags: str, code=0, **environment):
    """The words that slurm.sbatch gives to srun, which exits with a code, and to scontrol."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_text(f"PATH={tmp_path}:$PATH\n")
    for name, status in (("srun", code), ("scontrol", 0)):
        stub = tmp_path / name
        stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/{name}.log\nexit {status}\n')
        stub.chmod(0o755)
    environment |= {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_SUBMIT_DIR": str(tmp_path), "VENV": str(tmp_path)}
    script = ["bash", LAUNCH / "slurm.sbatch", *flags]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == code, done.stderr
    requeue = tmp_path / "scontrol.log"
    srun = (tmp_path / "srun.log").read_text().splitlines()
    return srun, requeue.read_text().split() if requeue.exists() else None


@pytest.mark.parametrize(("nodes", "distributed"), [("1", "auto"), ("4", "on")])
def test_slurm_starts_one_node_and_several(tmp_path, nodes, distributed):
    """`on` refuses a single task, which finds no others."""
    srun, requeue = submitted(tmp_path, *FLAGS, SLURM_JOB_NUM_NODES=nodes)
    start = srun.index("python")
    assert srun[start + 1 : start + 3] == ["-m", "dinov2_jax.train"]
    flags = parse_flags(srun[start + 3 :])
    assert flags.distributed == distributed
    assert flags.overrides == [tuple(PATTERN.removeprefix("--config.").split("=", 1))]
    assert requeue is None


@pytest.mark.parametrize("given", [{}, {"SLURM_CPUS_PER_TASK": "64"}], ids=["unset", "64"])
def test_slurm_gives_a_task_its_cpus(tmp_path, given):
    srun, _ = submitted(tmp_path, *FLAGS, **given)
    options = srun[: srun.index("python")]
    assert options == ["--kill-on-bad-exit=0", *(["--cpus-per-task=64"] if given else [])]


@pytest.mark.parametrize("code", [1, 2, 134, 143])
def test_slurm_queues_again_what_was_saved_and_stopped_and_nothing_else(tmp_path, code):
    _, requeue = submitted(tmp_path, *FLAGS, SLURM_JOB_NUM_NODES="4", code=code)
    assert requeue == (["requeue", "7"] if code == 143 else None)


# Stands for a process that takes a second to save: its files say when it has begun, and saved.
SAVES = """#!{python}
import os, pathlib, signal, sys, time
here = pathlib.Path({folder!r}) / os.environ["JAX_PROCESS_ID"]
def save(*_):
    time.sleep(1)
    here.with_suffix(".saved").write_text(repr(sys.argv[1:]))
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
here.with_suffix(".begun").touch()
time.sleep(30)
"""


def test_the_rehearsal_waits_for_its_processes_when_it_is_told_to_stop(tmp_path):
    """It did not, where the signal interrupted its own wait: they went on without it."""
    python = tmp_path / "python"
    python.write_text(SAVES.format(python=sys.executable, folder=str(tmp_path)))
    python.chmod(0o755)
    command = [LAUNCH / "local_multiprocess.sh", "3", "1", "--", "--config=configs/quickstart.py"]
    launcher = subprocess.Popen(command, env=os.environ | {"PYTHON": str(python)})
    try:
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob("*.begun"))) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=30) == 143
    finally:
        launcher.kill()
    saved = [ast.literal_eval(path.read_text()) for path in tmp_path.glob("*.saved")]
    assert len(saved) == 3
    for module, name, *flags in saved:
        assert (module, name) == ("-m", "dinov2_jax.train") and parse_flags(flags)


def test_the_rehearsals_coordinator_has_a_port_that_no_connection_takes(tmp_path):
    """Ports of 32768 and more are given to whatever connects, in the seconds before it listens."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho $JAX_COORDINATOR_ADDRESS\n")
    python.chmod(0o755)
    command = [LAUNCH / "local_multiprocess.sh", "2", "1", "--", "--config=x"]
    for _ in range(5):
        said = subprocess.check_output(command, env=os.environ | {"PYTHON": str(python)}, text=True)
        (address,) = set(said.split())
        host, port = address.split(":")
        assert host == "127.0.0.1" and 20000 <= int(port) < 32768
    environment = os.environ | {"PYTHON": str(python), "PORT": "40000"}
    assert subprocess.check_output(command, env=environment, text=True).split()[0][-6:] == ":40000"
