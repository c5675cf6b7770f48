"""Commands end with a code and one line, whatever went wrong with their input."""

import errno

import jax
import pytest

from dinov2_jax import commands
from dinov2_jax.commands import run_command
from dinov2_jax.distributed import HostError


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a\n  b"), 2, "error: a b"),
        (FileNotFoundError(errno.ENOENT, "gone", "x"), 2, "error: [Errno 2] gone: 'x'"),
        (ModuleNotFoundError("no av"), 2, "error: no av"),
        (HostError("alone"), 2, "error: alone"),
        (OSError(errno.ENOSPC, "full"), 1, "error: [Errno 28] full; free space, and the same"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, error, code, line):
    def fail():
        raise error

    assert run_command(fail) == code
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1


def test_what_is_right_or_a_mistake_of_ours(capsys):
    assert run_command(lambda: 7) == 7
    assert capsys.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


def test_ends_all_with_the_error_or_what_to_do_about_what_is_used_up(monkeypatch):
    rung = []
    monkeypatch.setattr(commands.alarm, "ring", lambda *args, **kwargs: rung.append((args, kwargs)))
    quota = RuntimeError("quota RESOURCE_EXHAUSTED")  # none of the devices'
    commands.end_all(quota, workdir="runs/a")
    assert rung == [((quota, 1), {"has_traceback": True})]
    commands.end_all(OSError(errno.ENOSPC, "full"), workdir="runs/a")
    (line, code), details = rung[1]
    assert line.startswith("no space left for --workdir=runs/a; free") and (code, details) == (
        1,
        {},
    )


def test_a_device_without_enough_memory_is_wrong_input_and_says_what_lowers_it():
    """A real refusal: so many bytes have no addresses."""
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(2**45))())
    line, code = commands.known_end(caught.value, workdir="runs/a")
    assert code == 2 and "mesh.fsdp" in line and "docs/pods.md" in line
    coordinator = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: message larger than max")
    assert commands.known_end(coordinator, workdir="runs/a") is None
    assert line.startswith("the memory of a device does not suffice (RESOURCE_EXHAUSTED: Out of")
