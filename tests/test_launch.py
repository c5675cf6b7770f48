"""The launch recipes: scripts and image are linted, YAML fits its schema, flags exist."""

import ast
import functools
import importlib.util
import operator
import re
import shlex
import subprocess
import sysconfig

import jsonschema
import pytest
import yaml

from configs import base
from dinov2_jax.config import REPOSITORY, load_config
from dinov2_jax.config_rules import check_groups
from dinov2_jax.flags import parse_flags
from dinov2_jax.train import WRONG_INPUT
from tests.jobset_schema import JOBSET

LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
JOBSET_VERSION = "1.33"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_linted(path):
    shellcheck = f"{sysconfig.get_path('scripts')}/shellcheck"
    done = subprocess.run([shellcheck, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert path.stat().st_mode & 0o100 or path.suffix == ".sbatch"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *((name, ()) for name in ("tpu_vm.sh", "local_multiprocess.sh", "xpk.sh")),
        *((name, ("--help",)) for name in ("tpu_vm.sh", "local_multiprocess.sh", "xpk.sh")),
        ("local_multiprocess.sh", ("2", "4", "--config=x")),
        ("local_multiprocess.sh", ("0", "4", "--", "--config=x")),
        ("local_multiprocess.sh", ("2", "four", "--", "--config=x")),
    ],
)
def test_without_arguments_that_it_knows_a_script_says_how_to_use_it(name, arguments):
    """Before it asks for anything in the environment."""
    environment = {"PATH": "/usr/bin:/bin"}
    command = [LAUNCH / name, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    header = (LAUNCH / name).read_text().partition("\nset -euo")[0].splitlines()[1:]
    assert done.stderr.splitlines() == [re.sub("^# ?", "", line) for line in header]


def jobset() -> dict:
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def keys_of(content, *path):
    """The path to every key of mappings in lists in mappings, but for names of annotations."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in pairs:
        if isinstance(content, dict):
            yield (*path, key)
        if isinstance(value, dict | list) and (*path, key)[-2:] != ("template", "spec"):
            if key != "annotations":
                yield from keys_of(value, *path, key)


def test_the_jobset_fits_its_schema():
    jsonschema.validate(jobset(), JOBSET)
    keys = list(keys_of(jobset()))
    assert ("spec", "failurePolicy", "rules", 0, "action") in keys
    for *path, key in keys:
        for misspelt, value in ((f"{key}s", None), (key, 1.5)):
            content = jobset()
            parent = functools.reduce(operator.getitem, path, content)
            parent[misspelt] = parent.pop(key) if value is None else value
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(content, JOBSET)


def test_the_jobs_of_the_jobset_fit_their_schema():
    import kubernetes_validate

    for replicated in jobset()["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
        job["spec"] = replicated["template"]["spec"]
        kubernetes_validate.validate(job, JOBSET_VERSION, strict=True)
        job["spec"]["template"]["spec"]["containers"][0]["arguments"] = []
        with pytest.raises(kubernetes_validate.ValidationError):  # the schema does bite
            kubernetes_validate.validate(job, JOBSET_VERSION, strict=True)


def test_the_jobset_restarts_but_not_with_wrong_input():
    """Code 2 fails the pod's Job, for a reason that fails the set: the first Job is enough."""
    policy = jobset()["spec"]["failurePolicy"]
    (rule,) = policy["rules"]
    assert policy["maxRestarts"] > 0
    assert rule["action"] == "FailJobSet"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (replicated,) = jobset()["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # Kubernetes allows no other here
    (rule,) = spec["podFailurePolicy"]["rules"]
    (container,) = spec["template"]["spec"]["containers"]
    codes = {"containerName": container["name"], "operator": "In", "values": [WRONG_INPUT]}
    assert rule == {"action": "FailJob", "onExitCodes": codes}


def test_the_jobset_asks_for_what_its_topology_has():
    (replicated,) = jobset()["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    pod = spec["template"]["spec"]
    rows, cols = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"] == int(rows) * int(cols) // chips
    parse_flags(container["args"])


def all_keys(config, prefix="") -> set[str]:
    keys = set()
    for name in config:
        value = config[name]
        keys |= all_keys(value, f"{prefix}{name}.") if hasattr(value, "keys") else {prefix + name}
    return keys


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_flags_are_those_of_the_command(path):
    text = path.read_text()
    keys = set(re.findall(r"--config\.([a-z_.]+)", text))
    assert keys <= all_keys(base.get_config())
    for name in re.findall(r"configs/\w+\.py", text):
        assert (REPOSITORY / name).exists(), name


def test_the_image_is_linted():
    hadolint = [f"{sysconfig.get_path('scripts')}/hadolint", "--no-color", "-"]
    text = (LAUNCH / "Dockerfile").read_text()
    done = subprocess.run(hadolint, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    # No version: the linter does bite.
    text = re.sub("FROM python.*", "FROM python", text)
    assert subprocess.run(hadolint, input=text, capture_output=True, text=True).returncode == 1


def test_the_image_installs_extras_and_files_that_exist():
    text = (LAUNCH / "Dockerfile").read_text()
    for module in re.findall(r'"-m", "([\w.]+)"', text):
        assert importlib.util.find_spec(module), module
    extras = set(re.search(r'extras="([^"]+)"', text)[1].split(","))
    extras |= set(re.search(r"DEVICE is (.+?)\.", text)[1].replace(" or", ",").split(", ")) - {
        "cpu"
    }
    (call,) = (
        node
        for node in ast.walk(ast.parse((REPOSITORY / "setup.py").read_text()))
        if isinstance(node, ast.keyword) and node.arg == "extras_require"
    )
    assert extras <= {key.value for key in call.value.keys}
    for line in text.splitlines():
        if line.startswith("COPY"):
            for source in shlex.split(line)[1:-1]:
                assert (REPOSITORY / source).exists(), source


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
    assert parse_flags(words[words.index("dinov2_jax.train") + 1 : words.index(">")]).overrides
    (tmp_path / "log").unlink()
    ((*_, stop),), _ = commands(tmp_path, "tpu_vm.sh", "stop")
    pattern = shlex.split(stop)[3]
    assert re.search(pattern, run) and not re.search(pattern, stop)


def test_tpu_vm_installs_a_python_that_the_package_allows(tmp_path):
    (copy, (*_, setup)), _ = commands(tmp_path, "tpu_vm.sh", "setup")
    assert "scp" in copy
    (version,) = re.findall(r"--python (3\.\d+)", setup)
    assert f'python_requires=">={version}"' in (REPOSITORY / "setup.py").read_text()
    assert f"FROM python:{version}-" in (LAUNCH / "Dockerfile").read_text()


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
    assert shlex.split(options["--command"])[-2:] == list(FLAGS)


@pytest.mark.parametrize(
    ("name", "num_devices"),
    [("tpu_vm.sh", 256), ("xpk.sh", 256), ("slurm.sbatch", 4 * 8), ("jobset.yaml", 2 * 16)],
)
def test_the_batch_of_an_example_is_whole_groups_on_its_devices(name, num_devices):
    header = (LAUNCH / name).read_text().partition("\nset -euo")[0]
    flags = parse_flags(shlex.split(" ".join(re.findall(r"--config\S+", header))))
    assert flags.overrides
    config = load_config(str(REPOSITORY / flags.config), flags.overrides, needs_data=False)
    check_groups(
        global_batch_size=config.global_batch_size,
        group_size=config.group_size,
        num_batch_shards=num_devices // config.mesh.model,
        num_micro_batches=config.grad_accumulation_steps,
    )
