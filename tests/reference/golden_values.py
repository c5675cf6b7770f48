"""The reference's golden values, computed with its public code and stored beside this file."""

import json
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "golden"


def arrays(file_name: str) -> dict[str, np.ndarray]:
    """All arrays of an .npz file."""
    with np.load(FOLDER / file_name) as archive:
        return dict(archive)


def table(file_name: str):
    """The content of a .json file."""
    return json.loads((FOLDER / file_name).read_text())
