"""StableHLO by `jax.export`: one file with the weights inside, for CPU, CUDA and TPU.

In: a model. Out: `jax.export`'s serialisation, any batch at one image size. JAX reads it for six
months or more after it was written; the archival format is safetensors.
"""

import json
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dinov2_jax.export.check import Run, outputs_by_name
from dinov2_jax.model import Model

PLATFORMS = ("cpu", "cuda", "tpu")
# The serialisation is a flatbuffer, whose offsets are 31 bits.
LARGEST_BYTES = 2**31 - 2**20


def write_stablehlo(
    path: pathlib.Path, model: Model, facts: Mapping[str, str], *, height: int, width: int
) -> Run:
    """Writes `path`, and `facts` as JSON in a file beside it whose name ends in `.json`.

    Returns:
      The file, read again, as a function of images.

    Raises:
      ValueError: the weights are too large for the format.
    """
    size = sum(x.nbytes for x in jax.tree.leaves(model.params))
    if size > LARGEST_BYTES:
        raise ValueError(
            f"a stablehlo file holds {LARGEST_BYTES / 1e9:.1f} GB, and the weights are "
            f"{size / 1e9:.1f} GB; choose onnx or safetensors"
        )

    def apply(images: jax.Array) -> dict[str, jax.Array]:
        return outputs_by_name(model.apply(model.params, images))

    shape = jax.export.symbolic_shape(f"b,{height},{width},{model.spec.in_channels}")
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    exported = jax.export.export(jax.jit(apply), platforms=PLATFORMS)(images)
    path.write_bytes(exported.serialize())
    facts_path = path.with_name(f"{path.name}.json")
    facts_path.write_text(json.dumps(dict(facts), indent=2) + "\n")
    run = jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)
    return lambda images: jax.tree.map(np.asarray, run(images))
