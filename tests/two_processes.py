"""A program run as two processes of a few lines each, which find each other on loopback."""

import os
import socket
import subprocess
import sys

from dinov2_jax.config import REPOSITORY


def run_two(program: str, *arguments: str) -> tuple[list[int], list[str]]:
    """Runs a program as processes 0 and 1; returns their exit codes, and what each said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env=environment | {"JAX_PROCESS_ID": index},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in "01"
    ]
    try:
        said = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
    return [process.returncode for process in processes], said
