"""The growth of a step: lines through what was measured, the file between, and its errors."""

import re
import sys

import numpy as np
import pytest

from benchmarks import growth
from benchmarks.contenders import load

# Of each axis: seconds that lie on a line, but for those of depth.
MEASURED = {
    "batch": lambda x: 0.5 + 2 * x,
    "crops": lambda x: 1 + 0.25 * x,
    "prototypes": lambda x: 3 + 1e-4 * x,
    "depth": lambda x: x**2,
}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The command, in a folder of its own; measuring takes no time. Collects what is measured."""
    measured = []

    def measure(axis, num_rounds):
        (name,) = (name for name, other in growth.AXES.items() if other is axis)
        measured.append((name, num_rounds))
        return growth.fit(axis.values, [MEASURED[name](value) for value in axis.values])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(growth, "measure", measure)
    monkeypatch.setattr(growth, "limit_threads", lambda num_threads: None)

    def main(*arguments: str) -> list:
        measured.clear()
        monkeypatch.setattr(sys, "argv", ["growth", *arguments])
        growth.main()
        return measured

    return main


def test_the_line_is_that_of_least_squares():
    line = growth.fit([0, 1, 2], [1.0, 2.0, 6.0])
    # Through the mean (1, 3), with the slope ((-1)(-2) + (1)(3)) / 2.
    assert (line.slope, line.start) == pytest.approx((2.5, 0.5))
    assert line.largest_miss == pytest.approx(1.0 / 6.0)  # 3 in place of 2, of at most 6


def test_every_size_is_a_configuration():
    for axis in growth.AXES.values():
        assert len(axis.values) >= 4 and list(axis.values) == sorted(set(axis.values))
        for value in axis.values:
            load(growth.CONFIG, dict.fromkeys(axis.keys, value))
    assert (growth.AXES["batch"].values[0], growth.AXES["batch"].values[-1]) == (1, 32)


def test_a_measurement_that_was_stopped_goes_on(run, capsys):
    assert run("measure", "file", "--axes", "depth", "batch", "--rounds", "3") == [
        ("depth", 3),
        ("batch", 3),
    ]
    assert "batch: 500.0 ms + 2000 ms each, within 0.0% of the largest" in capsys.readouterr().out
    assert run("measure", "file") == [("crops", 5), ("prototypes", 5)]
    assert run("measure", "file") == []
    assert run("measure", "file", "--axes", "crops") == [("crops", 5)]
    lines = growth.read("file")
    assert list(lines) == list(growth.AXES)
    for name, line in lines.items():
        np.testing.assert_array_equal(line.values, growth.AXES[name].values)
        np.testing.assert_allclose(line.seconds, MEASURED[name](line.values))
    assert lines["depth"].largest_miss > 0.1


def test_of_an_axis_that_is_there_twice_the_last_counts(tmp_path):
    for seconds in ([1, 2], [5, 7]):
        growth.add(str(tmp_path / "file"), "depth", growth.fit([2, 6], seconds))
    np.testing.assert_array_equal(growth.read(tmp_path / "file")["depth"].seconds, [5, 7])


def test_the_plot_has_a_panel_for_each_axis(run, tmp_path):
    pytest.importorskip("matplotlib", reason="pip install -e '.[benchmarks]'")
    run("measure", "file", "--axes", "batch", "depth")
    run("plot", "file", "--picture", "growth.svg")
    picture = (tmp_path / "growth.svg").read_text()
    assert len(set(re.findall(r'id="(axes_\d+)"', picture))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plot none", "there is no file none; make it by measure"),
        ("plot empty", "empty is empty; fill it by measure"),
        ("plot broken", "broken, line 2 is no measurement; remove it"),
        ("measure broken", "broken, line 2 is no measurement; remove it"),
        ("plot good --picture no/growth.png", "no/growth.png: there is no folder no; create it"),
        ("plot good --picture growth.txt", "growth.txt must end in .png or .svg"),
        ("measure no/file", "no/file: there is no folder no; create it"),
        ("measure .", ". is a folder; name a file in it"),
    ],
)
def test_errors_come_before_anything_is_measured(run, tmp_path, arguments, message):
    growth.add("good", "depth", growth.fit([2, 6], [1, 2]))
    (tmp_path / "empty").touch()
    (tmp_path / "broken").write_text((tmp_path / "good").read_text() + '{"axis": "dep')
    with pytest.raises(SystemExit, match=f"^error: .*{re.escape(message)}$"):
        run(*arguments.split())
    assert not (tmp_path / "growth.png").exists()


def test_without_matplotlib_the_plot_says_what_to_install(run, monkeypatch):
    growth.add("good", "depth", growth.fit([2, 6], [1, 2]))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"^error: plot needs .*pip install -e '\.\[benchmarks\]'"):
        run("plot", "good")
