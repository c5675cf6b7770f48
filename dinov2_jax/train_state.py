"""What training carries from step to step, and how it begins.

Student and teacher are two parameter trees of one network; nothing here is sharded by itself,
`sharding.tree_sharding` says where each leaf lies. Follows dinov2/train/ssl_meta_arch.py.
"""

import dataclasses
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dinov2_jax.models.heads import Head

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Network:
    """The modules that student and teacher share; each is applied with either's parameters.

    Attributes:
      backbone: the vision transformer.
      dino_head: head of the class tokens; with `ibot_head` None it serves the patches too. None
        when nothing needs it (iBOT only, with its own head).
      ibot_head: head of the masked patches, or None.
    """

    backbone: nn.Module
    dino_head: nn.Module | None
    ibot_head: nn.Module | None

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules that exist, by their name in the parameter tree."""
        named = {name: getattr(self, name) for name in ("backbone", "dino_head", "ibot_head")}
        return {name: module for name, module in named.items() if module is not None}

    @property
    def patch_head_name(self) -> str:
        """The name of the head that masked patches go through."""
        return "dino_head" if self.ibot_head is None else "ibot_head"

    def head(self, loss: str, params: Params) -> Head:
        """The head that the "dino" or the "ibot" loss sees features through."""
        name = "dino_head" if loss == "dino" else self.patch_head_name
        return Head(getattr(self, name), params[name])

    def apply(self, name: str, params: Params, *args, **kwargs):
        """Applies one module with its part of `params`."""
        return getattr(self, name).apply({"params": params[name]}, *args, **kwargs)

    def init(self, key: jax.Array, *, image_shape: tuple[int, int, int]) -> Params:
        """Initialises every module; `image_shape` is [height, width, c] of a global crop."""
        keys = jax.random.split(key, 3)
        features = jnp.zeros((1, self.backbone.embed_dim))
        inputs = {
            "backbone": jnp.zeros((1, *image_shape)),
            "dino_head": features,
            "ibot_head": features,
        }
        return {
            name: module.init(module_key, inputs[name])["params"]
            for module_key, (name, module) in zip(keys, self.modules.items(), strict=False)
        }


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint must hold to go on bit for bit, besides the data position."""

    step: jax.Array  # int32 [], steps done: also the index of the next step's batch
    student: Params
    teacher: Params
    opt_state: optax.OptState
    centers: dict[str, jax.Array]  # "dino" [k], "ibot" [k]; stay zero under Sinkhorn-Knopp


def init_state(
    key: jax.Array,
    *,
    network: Network,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
) -> TrainState:
    """The state before the first step; the teacher starts as a copy of the student.

    Pure: call it under `jax.jit(..., out_shardings=...)` so that no device ever holds it whole.
    """
    student = network.init(key, image_shape=image_shape)
    centers = {}
    if network.dino_head is not None:
        centers["dino"] = jnp.zeros((network.dino_head.num_prototypes,))
    patch_head = getattr(network, network.patch_head_name)
    centers["ibot"] = jnp.zeros((patch_head.num_prototypes,))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        student=student,
        teacher=jax.tree.map(jnp.copy, student),
        opt_state=optimizer.init(student),
        centers=centers,
    )
