"""The command line: what is set, and one-line errors for what is not a flag."""

import pytest

from dinov2_jax import train
from dinov2_jax.flags import parse_flags


def test_keys_are_collected_in_order_with_and_without_equals():
    flags = parse_flags(
        ["--config.seed=1", "--config=x.py", "--config.data.path", "a=b", "--config.seed=2"]
    )
    assert flags.config == "x.py" and flags.workdir is None and not flags.dry_run
    assert flags.overrides == [("seed", "1"), ("data.path", "a=b"), ("seed", "2")]


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--config=x.py", "--workdirr=y"], "did you mean --workdir?"),
        (["--config=x.py", "--batch"], "--config.KEY=VALUE sets a key"),
        (["--config=x.py", "--config.total_steps"], "--config.total_steps needs a value"),
        (["--config=x.py", "--dry_ru"], "did you mean --dry_run?"),  # never taken for it
        ([], "required: --config; see python -m dinov2_jax.train --help"),
    ],
)
def test_a_wrong_flag_is_one_line_and_code_2(capsys, argv, complaint):
    assert train.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and complaint in error
