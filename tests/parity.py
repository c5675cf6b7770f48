"""Getting an oracle (PyTorch, ONNX): skip where it is absent, fail where it must not be.

`DINOV2_JAX_REQUIRE_PARITY=1` (continuous integration) turns a missing oracle into a failure.
"""

import importlib
import os

import pytest


def require(*names: str):
    """Imports the named modules, or skips (or fails) the calling test or test module."""
    modules = []
    for name in names:
        try:
            modules.append(importlib.import_module(name))
        except ImportError as error:
            message = (
                f"parity needs {name}: {error}; pip install -e '.[test,parity,export]' and "
                "pip install --no-deps dinov2==0.0.1.dev2"
            )
            if os.environ.get("DINOV2_JAX_REQUIRE_PARITY") == "1":
                pytest.fail(message, pytrace=False)
            pytest.skip(message, allow_module_level=True)
    return modules[0] if len(modules) == 1 else modules
