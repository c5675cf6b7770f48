"""SIGTERM and SIGINT: the first asks the run to save and stop, the second ends it at once.

A cloud's notice that it takes the machine back (`preemption`) asks the same, as SIGTERM would.
A signal during the start-up is heeded before the first step, when there is nothing to save yet.
"""

import math
import os
import signal
import sys
import threading
import time
from types import FrameType

HANDLED = (signal.SIGTERM, signal.SIGINT)
# Sooner than this a second signal is the first: launchers pass on what all processes had already.
SAME_SIGNAL_SECS = 1.0


class StopSignals:
    """A context manager; `received` is the number of the signal that came, or None.

    Another process of the run may receive one too: `exchange` tells all.
    """

    def __init__(self):
        self.received: int | None = None
        self._received_at = -math.inf
        self._is_noticed = False
        self._previous = {}

    def __enter__(self) -> "StopSignals":
        # Python lets only the main thread handle signals.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in HANDLED}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def notice(self, text: str) -> None:
        """Asks to stop as SIGTERM does, of which the first that follows is the same word."""
        if self.received is None:
            self._is_noticed, self.received = True, signal.SIGTERM
            _say(text)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._is_noticed and number == signal.SIGTERM:
            self._is_noticed, self._received_at = False, time.monotonic()
            return
        if self.received is not None:
            if time.monotonic() - self._received_at >= SAME_SIGNAL_SECS:
                os._exit(128 + number)
            return
        self.received, self._received_at = number, time.monotonic()
        _say(signal.Signals(number).name)


def _say(why: str) -> None:
    # Not print: the handler may interrupt one.
    text = f"\n{why}: stopping where nothing is lost; once more to stop at once\n"
    os.write(sys.__stderr__.fileno(), text.encode())
