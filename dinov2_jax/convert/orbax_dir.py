"""Our Orbax checkpoints: a run's workdir or one of its steps, and folders of parameters alone.

In: a folder. Out: nested numpy parameters, and the model's record that lies beside them.
"""

import json
import logging
import pathlib
from collections.abc import Mapping

import numpy as np

from dinov2_jax.convert.spec import METADATA_KEY, SPEC_FILE

PARAMS = "params"
CHUNK_BYTES = 2**26  # of an array that are compressed at a time
# What `dinov2_jax.checkpoints` and `dinov2_jax.train_state` call things.
CHECKPOINTS, STATE = "checkpoints", "state"
TREES = ("teacher", "student")


def is_orbax(path: pathlib.Path) -> bool:
    """Whether a folder is a workdir with checkpoints, one checkpoint, or parameters alone."""
    return any((path / name).is_dir() for name in (CHECKPOINTS, STATE, PARAMS))


def read_orbax(path: pathlib.Path, *, tree: str = "teacher") -> tuple[dict, dict[str, str], str]:
    """Reads `(parameters, metadata, what was read)`.

    Args:
      path: a workdir (its newest step is read), one step's folder, or parameters alone.
      tree: "teacher" or "student", of a run.

    Raises:
      ValueError: no checkpoint is there, it lacks the tree, or it cannot be read.
    """
    facts = next((p / SPEC_FILE for p in (path, *path.absolute().parents[:2])
                  if (p / SPEC_FILE).exists()), None)  # fmt: skip
    metadata = {} if facts is None else {METADATA_KEY: facts.read_text()}
    if (path / PARAMS).is_dir():
        return _restore(path / PARAMS, None), metadata, "parameters"
    if tree not in TREES:
        raise ValueError(f"{tree=} must be one of {TREES}; choose one of them")
    step = path
    if (path / CHECKPOINTS).is_dir():
        steps = [p for p in (path / CHECKPOINTS).iterdir() if p.name.isdigit()]
        if not steps:
            raise ValueError(f"{path / CHECKPOINTS} must hold a checkpoint; it has none yet")
        step = max(steps, key=lambda p: int(p.name))
    return _restore(step / STATE, tree), metadata, f"{tree} of step {step.name}"


def _restore(path: pathlib.Path, branch: str | None) -> dict:
    """Restores a tree of numpy arrays, or one branch of it."""
    import jax
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(path.absolute()).item_metadata.tree
            if branch is not None:
                tree = {branch: tree[branch]}
            restored = checkpointer.restore(
                path.absolute(),
                args=ocp.args.PyTreeRestore(
                    item=tree,
                    restore_args=jax.tree.map(
                        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
                    ),
                    partial_restore=True,
                ),
            )
    # Orbax and TensorStore raise many kinds.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{path} must be a whole Orbax checkpoint ({reason})") from error
    return restored if branch is None else restored[branch]


def write_orbax(path: pathlib.Path, params: Mapping, metadata: Mapping[str, str]) -> None:
    """Writes parameters and their record into a folder that does not exist yet."""
    import jax
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    path.mkdir()
    # Neither a copy of everything (nothing changes it while it is written) nor one database file,
    # whose writer gathers all arrays in memory: ViT-g would need three times its size.
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False))
        ),
    )
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            (path / PARAMS).absolute(), args=ocp.args.PyTreeSave(params, save_args=save_args)
        )
    facts = json.loads(metadata[METADATA_KEY])
    (path / SPEC_FILE).write_text(json.dumps(facts, indent=2) + "\n")
