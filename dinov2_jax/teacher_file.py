"""The latest teacher as one file: `teacher.safetensors`, under the reference's names."""

from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from dinov2_jax.convert.safetensors_file import write_safetensors
from dinov2_jax.convert.state_dict import to_reference
from dinov2_jax.distributed import fetch, is_primary
from dinov2_jax.storage import made_locally

TEACHER_FILE = "teacher.safetensors"


def teacher_writer(workdir: epath.Path, metadata: Mapping[str, str]) -> Callable[[Any, int], None]:
    """Returns `write(teacher, step)`, which every process must call; the primary one writes.

    Args:
      workdir: of the run.
      metadata: for the file's header; the step is added.
    """

    def write(teacher: Any, step: int) -> None:
        params = fetch(teacher)
        if is_primary():
            header = {**metadata, "step": str(step)}
            with made_locally(workdir / TEACHER_FILE) as file:
                write_safetensors(file, to_reference(params), header)

    return write
