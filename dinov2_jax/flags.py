"""The flags of the commands: their own few, and `--config.KEY=VALUE` for any key."""

import argparse
from collections.abc import Sequence

from dinov2_jax.config import nearest
from dinov2_jax.config_rules import ConfigError
from dinov2_jax.distributed import MODES


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of `train`; see `parse_with_overrides`."""
    parser = argparse.ArgumentParser(
        prog="python -m dinov2_jax.train",
        description="Trains a DINOv2 model.",
        epilog="--config.KEY=VALUE sets any key of configs/base.py, such as "
        "--config.data.path=/your/images or --config.total_steps=1000.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="folder, gs://bucket/folder or s3://bucket/folder; default: runs/<name of the config>",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print the start-up table and exit; writes nothing"
    )
    parser.add_argument(
        "--suggest",
        action="store_true",
        help="print values that fit the data, batch and steps, with reasons, and exit",
    )
    parser.add_argument(
        "--allow_config_change",
        action="store_true",
        help="resume although keys that change results differ",
    )
    parser.add_argument(
        "--distributed",
        default="auto",
        choices=MODES,
        help="whether this is one process of several: auto (default) looks for Cloud TPU, SLURM, "
        "OpenMPI, Kubernetes and JAX_COORDINATOR_ADDRESS; on must find one; off never looks",
    )
    return parse_with_overrides(parser, argv)


def parse_with_overrides(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> argparse.Namespace:
    """Adds `--config` to a parser, and parses.

    Returns:
      The flags; `overrides` has the (key, text) of every `--config.key=text`.

    Raises:
      ConfigError: an unknown or wrong flag, with the nearest known one.
    """
    parser.add_argument("--config", required=True, metavar="FILE", help="such as configs/vits14.py")

    def refuse(message: str):
        raise ConfigError(f"{message}; see {parser.prog} --help")

    parser.error = refuse  # one line, like every other error
    flags, rest = parser.parse_known_args(argv)
    flags.overrides = []
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        if not name.startswith("--config."):
            known = [option for action in parser._actions for option in action.option_strings]
            suggestion = nearest(name, known)
            cure = f"did you mean {suggestion}?" if suggestion else "--config.KEY=VALUE sets a key"
            raise ConfigError(f"{name}: no such flag; {cure}")
        if not equals:
            if not rest:
                raise ConfigError(f"{name} needs a value: {name}=VALUE")
            text = rest.pop(0)
        flags.overrides.append((name.removeprefix("--config."), text))
    return flags
