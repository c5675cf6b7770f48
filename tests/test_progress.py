"""Progress: readable lines without a terminal, a bar on one."""

import io
import sys

import pytest

from dinov2_jax import progress
from dinov2_jax.progress import Display, format_secs, format_step

VALUES = {"total_loss": 1.5, "ibot_loss": 0.25, "images_per_sec": 10.0}


def test_lines_are_plain_and_spaced(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Display(total=100, done=20) as display:
        for step in range(30, 101, 10):
            now[0] += 2.0
            display.advance(step)
            display.show(step, format_step(VALUES))
        display.line("an evaluation")
    lines = capsys.readouterr().out.splitlines()
    steps = [int(line.split()[1].split("/")[0]) for line in lines[:-1]]
    assert steps == [30, 60, 90, 100]  # every 5 s at most, and the last
    assert lines[0] == "step 30/100  loss 1.5  ibot 0.25  10 images/s  14s left"
    assert lines[-1] == "an evaluation"


def test_a_terminal_gets_a_bar_with_the_numbers(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with Display(total=10, done=0, unit="image") as display:
        display.show(5, format_step(VALUES))
        display.line("step 5 [brackets] stay")
        display.advance(10)
    text = terminal.getvalue()
    assert "image" in text and "10/10" in text and "loss 1.5" in text and "[brackets] stay" in text


@pytest.mark.parametrize(
    ("secs", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (200, "3m20s"), (18_120, "5h02m"), (273_600, "3d04h")],
)
def test_seconds_in_words(secs, text):
    assert format_secs(secs) == text
