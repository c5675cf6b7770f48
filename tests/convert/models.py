"""Tiny models with random parameters, in every shape that the formats must hold."""

import numpy as np

from dinov2_jax.convert.spec import ModelSpec
from dinov2_jax.convert.state_dict import nest

# width 16, so that SwiGLU's hidden width, a multiple of 8, has an integer ratio.
BASE = dict(
    patch_size=4,
    embed_dim=16,
    depth=11,
    num_heads=2,
    ffn="mlp",
    hidden_dim=64,
    num_register_tokens=0,
    pos_embed_grid=(3, 3),
    interpolation="offset",
    in_channels=3,
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 0.6),
    resize_size_px=18,
    crop_size_px=12,
)
MODELS = {
    "mlp": {},
    "swiglu": dict(ffn="swiglu", hidden_dim=48, depth=2),
    "registers": dict(num_register_tokens=4, interpolation="antialias", depth=2),
    "registers_swiglu": dict(
        num_register_tokens=1, ffn="swiglu", hidden_dim=48, depth=1, interpolation="antialias"
    ),
    "switch": dict(interpolation="plain", depth=1, num_heads=4),
}


def make_spec(name: str = "mlp", **settings) -> ModelSpec:
    """One of `MODELS`."""
    return ModelSpec(**(BASE | MODELS[name] | settings))


def make_params(spec: ModelSpec, *, heads=(), dtype=np.float32) -> dict:
    """Random parameters: of the backbone, or {"backbone": .., head: ..}.

    Kernels keep the variance of their inputs, as trained ones do: with standard normal ones the
    residuals reach a thousand, and whether 1e-5 holds depends on the machine's vector width.
    """
    rng = np.random.default_rng(0)
    d = spec.embed_dim
    shapes = {f"backbone/{path}": shape for path, shape in spec.shapes().items()}
    for head in heads:
        if head == "linear_head":
            shapes |= {"linear_head/kernel": (2 * d, 7), "linear_head/bias": (7,)}
        else:
            for layer, (inputs, outputs) in {0: (d, 9), 2: (9, 9), 4: (9, 5)}.items():
                shapes |= {
                    f"{head}/mlp/{layer}/kernel": (inputs, outputs),
                    f"{head}/mlp/{layer}/bias": (outputs,),
                }
            shapes |= {
                f"{head}/last_layer/weight_g": (6, 1),
                f"{head}/last_layer/weight_v": (6, 5),
            }
    arrays = {path: rng.standard_normal(shape) for path, shape in shapes.items()}
    for path, array in arrays.items():
        if path.endswith("/kernel"):
            array /= np.sqrt(np.prod(array.shape[:-1]))
    arrays = {path: array.astype(dtype) for path, array in arrays.items()}
    params = nest(arrays)
    return params if heads else params["backbone"]


def assert_same(ours, theirs, path: str = "") -> None:
    """Equal trees, bit for bit, types included."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), path
        for name, branch in theirs.items():
            assert_same(ours[name], branch, f"{path}/{name}")
        return
    assert ours.dtype == theirs.dtype, path
    assert ours.shape == theirs.shape, path
    assert ours.tobytes() == theirs.tobytes(), path
