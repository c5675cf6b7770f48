"""A program run as two processes of a few lines each, which find each other on loopback."""

import os
import random
import socket
import subprocess
import sys

from dinov2_jax.config import REPOSITORY


def free_port() -> int:
    """A port that nobody has, nor gets soon: below those that Linux takes for connections."""
    while True:
        port = random.SystemRandom().randrange(20000, 32768)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def run_two(program: str, *arguments: str) -> tuple[list[int], list[str]]:
    """Runs a program as processes 0 and 1; returns their exit codes, and what each said."""
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
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
