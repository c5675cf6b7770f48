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
from dinov2_jax import compile as compile_command
from dinov2_jax.config import REPOSITORY, load_config
from dinov2_jax.config_rules import check_groups
from dinov2_jax.flags import parse_flags
from dinov2_jax.train import WRONG_INPUT
from tests.jobset_schema import JOBSET

LAUNCH = REPOSITORY / "launch"
PODS = REPOSITORY / "docs" / "pods.md"
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


@pytest.mark.parametrize("path", [*sorted(LAUNCH.iterdir()), PODS], ids=lambda path: path.name)
def test_keys_and_recipes_exist(path):
    text = path.read_text()
    keys = set(re.findall(r"--config\.([a-z_.]+)", text))
    assert keys <= all_keys(base.get_config())
    for name in re.findall(r"configs/\w+\.py", text):
        assert (REPOSITORY / name).exists(), name


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_flags_of_an_example_are_those_of_the_command(path):
    """What a script itself gives to the command is parsed where it is run: tests beside this."""
    header = path.read_text().partition("\nset -euo")[0].replace(" \\\n#", "")
    examples = re.findall("^#   .*--config=.*", header, re.MULTILINE)
    assert examples
    for example in examples:
        _, _, flags = example.rpartition(path.name)  # before it are those of sbatch
        words = [word for word in shlex.split(flags) if re.match("--.", word)]
        assert parse_flags(words).overrides


def test_the_flags_of_commands_in_the_documentation_are_theirs():
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", PODS.read_text(), re.DOTALL | re.MULTILINE))
    commands = re.findall(r"python -m dinov2_jax\.(\w+) (.*)", blocks.replace("\\\n", ""))
    assert commands
    for name, flags in commands:
        {"train": parse_flags, "compile": compile_command.parse_flags}[name](shlex.split(flags))


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
