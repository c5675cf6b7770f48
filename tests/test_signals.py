"""Signals: the first is noted, the second ends the process at once."""

import os
import signal
import subprocess
import sys

import pytest

from dinov2_jax.config import REPOSITORY
from dinov2_jax.signals import HANDLED, StopSignals


@pytest.mark.parametrize("number", HANDLED)
def test_the_first_is_noted_and_the_handlers_come_back(number):
    before = [signal.getsignal(handled) for handled in HANDLED]
    with StopSignals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number
    assert [signal.getsignal(handled) for handled in HANDLED] == before


def test_the_second_ends_the_process_at_once_if_it_is_not_the_first_passed_on():
    program = (
        "import os, signal\n"
        "from dinov2_jax import signals\n"
        "with signals.StopSignals() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)  # passed on by a launcher\n"
        "    print(stop.received, flush=True)\n"
        "    signals.SAME_SIGNAL_SECS = 0\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('not reached', flush=True)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (143, "15\n")
    assert "SIGTERM: stopping where nothing is lost; once more" in result.stderr
