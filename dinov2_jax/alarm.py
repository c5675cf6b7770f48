"""A process that fails alone tells the others, which would wait for it for minutes, then abort.

The word goes by the coordinator of `jax.distributed`, which answers while devices wait. All then
end at its last meeting: process 0, where it lives, must not go before the others.
"""

import atexit
import os
import sys
import threading
import traceback

import jax

# The coordinator's keys have no public door in jax 0.10; Orbax takes this one too.
from jax._src.distributed import global_state

_KEY = "dinov2_jax/failure"
_EVERY_SECS = 1.0
# What fails on all processes, each says itself, and ends with a code of its own.
_GRACE_SECS = 2.0
# Whoever has it ends this process, and keeps it: the main thread or the watch.
_ending = threading.RLock()


def watch() -> None:
    """Lets this process end, from now on, when another has rung: with its code, saying its error.

    Looks once a second in a thread of its own, until this process comes to its own end.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(stop,), daemon=True)

    def end_watch():
        _ending.acquire()
        stop.set()
        thread.join()

    thread.start()
    atexit.register(end_watch)  # jax's own end comes later, and finds the others there


def ring(error: Exception | str, code: int, *, has_traceback: bool = False) -> None:
    """Says an error on stderr, and ends this process and all others; a single one just returns.

    Comes after everything is closed: a checkpoint on its way needs the others until it is whole.

    Args:
      error: of this process.
      code: exit code, of all.
      has_traceback: says all of it, as Python does of an error that nobody expects.
    """
    _ending.acquire()  # where the watch has it, this error comes of that end
    if not jax.distributed.is_initialized() or global_state.num_processes == 1:
        return
    process, text = f"process {global_state.process_id}", " ".join(str(error).split())
    why = f"{type(error).__name__}: {text}" if has_traceback else text
    try:
        global_state.client.key_value_set(_KEY, f"{code} {process} failed: {why[:500]}")
    except jax.errors.JaxRuntimeError:  # another was first
        pass
    if has_traceback:
        traceback.print_exception(error)
    _leave(code, f"{process}: {why}")


def _watch(stop: threading.Event) -> None:
    client = global_state.client
    while not stop.wait(_EVERY_SECS):
        try:
            code, text = client.key_value_try_get(_KEY).split(" ", 1)
        except jax.errors.JaxRuntimeError:  # nobody has rung
            continue
        stop.wait(_GRACE_SECS)
        if _ending.acquire(blocking=False):
            _leave(int(code), f"process {global_state.process_id}: {text}")
        return


def _leave(code: int, text: str) -> None:
    """Ends without Python's own end, which would wait for the devices."""
    print(f"error: {text}", file=sys.stderr)
    try:
        jax.distributed.shutdown()  # returns when all have come to it
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
