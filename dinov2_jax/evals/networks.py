"""Models by name for evaluation: trained ones, random ones, and pixels that need no network.

`load_network("pixels")` and `load_network("random:dinov2_vits14")` are the baselines that a
trained model has to beat, and take part in every task as if they were models.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from dinov2_jax import hub
from dinov2_jax.convert import ModelSpec, read_model
from dinov2_jax.convert.spec import IMAGENET_MEAN, IMAGENET_STD, RELEASED, resolve_interpolation
from dinov2_jax.evals.baselines import RAW_PIXELS_SIZE_PX
from dinov2_jax.model import Model
from dinov2_jax.models.vit import BackboneOutput

PIXELS, RANDOM = "pixels", "random:"
PIXELS_PATCH_SIZE = 14


def load_network(
    name: str,
    *,
    num_blocks: int | None = None,
    seed: int = 0,
    uneven: str = "pad",
    tree: str = "teacher",
    dtype: Any = jnp.float32,
    interpolation: str | None = None,
    num_heads: int | None = None,
    attention: str | None = None,
) -> Model:
    """Loads what is to be evaluated.

    Args:
      name: what `dinov2_jax.load` takes; or "pixels" (patches of 14 px; "pixels:8": of 8); or
        "random:" and what `load` takes, for its sizes with random weights (LayerScale 1).
      num_blocks: the network ends after so many blocks; None: all.
      seed: of random weights.
      uneven, dtype, attention: see `dinov2_jax.Model`.
      tree, interpolation, num_heads: see `dinov2_jax.convert.read_model`.

    Raises:
      FileNotFoundError, ValueError: as `dinov2_jax.load`, or `num_blocks` is out of range.
    """
    settings = dict(dtype=dtype, uneven=uneven, name=name)
    if name == PIXELS or name.startswith(f"{PIXELS}:"):
        if num_blocks is not None:
            raise ValueError(f"{num_blocks=} must be left out: pixels have no blocks")
        return PixelModel(_pixel_spec(name), {}, **settings)
    reading = dict(tree=tree, interpolation=interpolation, num_heads=num_heads)
    if name.startswith(RANDOM):
        spec = _spec(name.removeprefix(RANDOM), reading)
        params = _random_params(spec, seed)
    else:
        spec, params = read_model(hub.find(name), **reading)
    if num_blocks is not None:
        spec, params = _cut(spec, params, num_blocks)
    return Model(spec, params, attention=attention, **settings)


class PixelModel(Model):
    """Pixels as features: the whole image at 32 px for CLS, each patch's own for its token."""

    def apply(self, params: Any, images: jax.Array) -> BackboneOutput:
        """CLS `[b, 32 * 32 * c]` less its mean, patches `[b, n, patch * patch * c]`."""
        del params
        images = self._fit(images).astype(self.dtype)
        b, _, _, c = images.shape
        side, p = RAW_PIXELS_SIZE_PX, self.spec.patch_size
        small = jax.image.resize(images, (b, side, side, c), "linear").reshape(b, -1)
        patches = rearrange(images, "b (h p1) (w p2) c -> b (h w) (p1 p2 c)", p1=p, p2=p)
        return BackboneOutput(
            cls=small - small.mean(axis=1, keepdims=True), registers=patches[:, :0], patches=patches
        )

    def apply_layers(self, params, images, layers, norm) -> list[BackboneOutput]:
        """The same for every layer: there are none."""
        del norm
        count = layers if isinstance(layers, int) else len(layers)
        return [self.apply(params, images)] * count

    def normalise(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Nothing to normalise."""
        del params
        return tokens


def _pixel_spec(name: str) -> ModelSpec:
    text = name.removeprefix(PIXELS).removeprefix(":") or str(PIXELS_PATCH_SIZE)
    if not text.isdecimal() or not int(text):
        raise ValueError(f"{name!r} must be pixels, or pixels:8 for patches of 8 px")
    patch_size = int(text)
    return ModelSpec(
        patch_size=patch_size,
        embed_dim=patch_size**2 * 3,
        depth=1,
        num_heads=1,
        ffn="mlp",
        hidden_dim=4 * patch_size**2 * 3,
        num_register_tokens=0,
        pos_embed_grid=(1, 1),
        interpolation="antialias",
        in_channels=3,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def _spec(name: str, reading: dict[str, Any]) -> ModelSpec:
    if name not in hub.RELEASED:
        return read_model(hub.find(name), **reading)[0]
    variant, registers = hub.RELEASED[name]
    (embed_dim, depth, ffn), _ = next(item for item in RELEASED.items() if item[1] == variant)
    return ModelSpec(
        patch_size=hub.PATCH_SIZE,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=embed_dim // 64,
        ffn=ffn,
        hidden_dim=4 * embed_dim if ffn == "mlp" else 4096,
        num_register_tokens=registers,
        pos_embed_grid=hub.POSITIONS,
        interpolation=resolve_interpolation("reference", registers),
        in_channels=3,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def _random_params(spec: ModelSpec, seed: int) -> Any:
    rows, cols = spec.pos_embed_grid
    image = jnp.zeros((1, rows * spec.patch_size, cols * spec.patch_size, spec.in_channels))
    # At the 1e-5 that training starts from, CLS would hardly see the image: no baseline to beat.
    module = spec.build(layer_scale_init=1.0)
    return jax.jit(module.init)(jax.random.key(seed), image)["params"]


def _cut(spec: ModelSpec, params: Any, num_blocks: int) -> tuple[ModelSpec, Any]:
    if not 1 <= num_blocks <= spec.depth:
        raise ValueError(f"{num_blocks=} must be between 1 and the model's {spec.depth} blocks")
    blocks = jax.tree.map(lambda x: x[:num_blocks], params["blocks"])
    return dataclasses.replace(spec, depth=num_blocks), {**params, "blocks": blocks}
