"""A frozen model for use: `dinov2_jax.load(..)`, then `model(images)`.

In: normalised images, as `model.preprocess` makes them. Out: CLS, register and patch tokens, of
the last block or of several. Behaviour follows `forward_features` and `get_intermediate_layers`
of dinov2/models/vision_transformer.py (Apache-2.0).
"""

import functools
import hashlib
import operator
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from dinov2_jax import hub
from dinov2_jax.convert import ModelSpec, read_model
from dinov2_jax.models.attention import choose_implementation, default_implementation
from dinov2_jax.models.vit import BackboneOutput
from dinov2_jax.preprocess import ImageLike, preprocess
from dinov2_jax.sharding import path_names

UNEVEN = ("error", "pad", "crop")


class Model:
    """A backbone with its parameters and its preprocessing. `load` makes one.

    Attributes:
      spec: sizes, rules and preprocessing: see `dinov2_jax.convert.ModelSpec`.
      params: of the backbone, on the devices.
    """

    def __init__(
        self,
        spec: ModelSpec,
        params: Any,
        *,
        dtype: Any = jnp.float32,
        uneven: str = "error",
        attention: str | None = None,
        name: str = "",
    ):
        """Binds a record and parameters, as `dinov2_jax.convert.read_model` gives them.

        Args:
          spec: what the model is.
          params: nested arrays of the backbone.
          dtype: compute type; outputs have it too. Normalisations and softmax stay float32.
          uneven: what happens to images whose sides are no multiples of the patch: "error",
            "pad" (zeros on all sides, centred, as the reference's dense evaluations do) or "crop"
            (centred).
          attention: see `dinov2_jax.models.attention.choose_implementation`. None: "by_head" on one
            CPU device, "xla" elsewhere: what runs on any devices, at any size and type.
          name: what it was loaded from, for people.

        Raises:
          ValueError: an unknown value of `uneven`, or an `attention` that the device or `dtype` has
            not.
        """
        if uneven not in UNEVEN:
            raise ValueError(f"{uneven=} must be one of {UNEVEN}; choose one of them")
        self.spec, self.uneven, self.dtype, self.name = spec, uneven, jnp.dtype(dtype), name
        attention = attention or default_implementation()
        attention = choose_implementation(attention, jax.devices()[0], self.dtype)
        self._module = spec.build(dtype=self.dtype, attention=attention)
        self._last = jax.jit(self.apply)
        self._several = jax.jit(self.apply_layers, static_argnums=(2, 3))
        self._attention = jax.jit(self._apply_attention, static_argnums=2)
        # Kernels are what the compute type is for; cast here, they take half the memory.
        self.params = jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.asarray(x, dtype if path[-1].key == "kernel" else None), params
        )

    @functools.cached_property
    def weights_sha256(self) -> str:
        """Of names, types, shapes and numbers of `params`, as the network uses them."""
        return _sha256(self.params)

    def __repr__(self) -> str:
        return f"Model({self.spec.describe()})"

    def __call__(self, images: jax.Array) -> BackboneOutput:
        """Embeds images.

        Args:
          images: `[b, height, width, c]`, normalised; any size, see `uneven`.

        Returns:
          `cls [b, d]`, `registers [b, r, d]` and `patches [b, n, d]` (row by row, see `grid`),
          after the final normalisation.

        Raises:
          ValueError: not four axes, a wrong number of channels, no image, sides below a patch, or
            sides that are no multiples of it where `uneven` is "error".
        """
        return self._last(self.params, self._check(images))

    def intermediate_layers(
        self,
        images: jax.Array,
        n: int | Sequence[int] = 1,
        *,
        norm: bool = True,
        reshape: bool = False,
    ) -> list[BackboneOutput]:
        """Outputs of several blocks, in the order of the blocks.

        Args:
          images: as for `__call__`.
          n: how many of the last blocks, or which blocks, counted from 0.
          norm: whether the final normalisation is applied to each.
          reshape: whether patches come as a grid `[b, h, w, d]` instead of `[b, n, d]`.

        Returns:
          One `BackboneOutput` per block.

        Raises:
          ValueError: as `__call__`, or blocks that do not exist.
        """
        images = self._check(images)
        is_count = isinstance(n, (int, np.integer))
        layers = int(n) if is_count else tuple(map(operator.index, n))
        outputs = self._several(self.params, images, layers, norm)
        if not reshape:
            return outputs
        h, _ = self.grid(*images.shape[1:3])
        return [
            x.replace(patches=rearrange(x.patches, "b (h w) d -> b h w d", h=h)) for x in outputs
        ]

    def cls_attention(self, images: jax.Array, block: int | None = None) -> jax.Array:
        """How much CLS attends to each token in one block, head by head.

        Args:
          images: as for `__call__`.
          block: counted from 0; None: the last.

        Returns:
          Probabilities, float32 `[b, heads, 1 + r + n]`: of CLS, registers and patches (row by
          row, see `grid`). Rows sum to 1.

        Raises:
          ValueError: as `__call__`, or a block that does not exist.
        """
        block = self.spec.depth - 1 if block is None else block
        return self._attention(self.params, self._check(images), block)

    def preprocess(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        resize_size_px: int | None = None,
        crop_size_px: int | None = None,
        crop: bool = True,
    ) -> np.ndarray:
        """Prepares images as the model's record says: resize, centred crop, mean and std.

        Args:
          images: a path, bytes of a file, a Pillow image or an array; or a list of them: see
            `dinov2_jax.preprocess.preprocess`.
          resize_size_px: of the short side; None: the record's (256 for the released models), or
            `crop_size_px` where that is larger.
          crop_size_px: of the crop; None: the record's (224).
          crop: False keeps the whole image, each side at the nearest multiple of the patch.

        Returns:
          float32 `[b, height, width, c]`, which the model takes.
        """
        sizes = self.sizes(resize_size_px=resize_size_px, crop_size_px=crop_size_px, crop=crop)
        return preprocess(images, mean=self.spec.mean, std=self.spec.std, **sizes)

    def sizes(
        self, *, resize_size_px: int | None, crop_size_px: int | None, crop: bool
    ) -> dict[str, int | None]:
        """The sizes that `dinov2_jax.preprocess` takes; arguments and defaults as `preprocess`."""
        if crop_size_px is None:
            crop_size_px = self.spec.crop_size_px
        if resize_size_px is None:
            resize_size_px = max(self.spec.resize_size_px, crop_size_px)
        return {
            "resize_size_px": resize_size_px,
            "crop_size_px": crop_size_px if crop else None,
            "patch_size": self.spec.patch_size,
        }

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches that an image of this size has, after `uneven`."""
        added = self.spec.patch_size - 1 if self.uneven == "pad" else 0
        return (height + added) // self.spec.patch_size, (width + added) // self.spec.patch_size

    def _check(self, images: jax.Array) -> jax.Array:
        images = jnp.asarray(images)
        if images.ndim != 4:
            raise ValueError(
                f"images must be [b, height, width, c], not {list(images.shape)}; model.preprocess "
                "makes such arrays of paths, Pillow images and arrays"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"images must be normalised floats, not {images.dtype}; pass them through "
                "model.preprocess"
            )
        b, height, width, _ = images.shape
        if b == 0 or 0 in self.grid(height, width):
            raise ValueError(
                f"images must be at least one, of a patch of {self.spec.patch_size} px or more a "
                f"side, not {list(images.shape)}; enlarge them, or leave such a batch out"
            )
        return images

    def apply(self, params: Any, images: jax.Array) -> BackboneOutput:
        """`__call__` as a pure function of the parameters, for a caller's own `jax.jit`."""
        return self._module.apply({"params": params}, self._fit(images))

    def apply_layers(
        self, params: Any, images: jax.Array, layers: int | tuple[int, ...], norm: bool
    ) -> list[BackboneOutput]:
        """`intermediate_layers` as a pure function of the parameters."""
        return self._module.apply(
            {"params": params}, self._fit(images), layers, norm=norm, method="intermediate_layers"
        )

    def _apply_attention(self, params, images, block):
        return self._module.apply(
            {"params": params}, self._fit(images), block, method="cls_attention"
        )

    def normalise(self, params: Any, tokens: jax.Array) -> jax.Array:
        """The final normalisation alone, as a pure function: of tokens `[.., d]`."""
        return self._module.apply({"params": params}, tokens, method=lambda m, x: m.norm(x))

    def _fit(self, images: jax.Array) -> jax.Array:
        """Pads or crops both sides to multiples of the patch, as `uneven` says."""
        if self.uneven == "error":
            return images  # the patch embedding complains, and says how to mend it
        height, width = images.shape[1:3]
        rows, cols = self.grid(height, width)
        new_height, new_width = rows * self.spec.patch_size, cols * self.spec.patch_size
        top, left = abs(new_height - height) // 2, abs(new_width - width) // 2
        if self.uneven == "crop":
            return images[:, top : top + new_height, left : left + new_width]
        below, right = new_height - height - top, new_width - width - left
        return jnp.pad(images, ((0, 0), (top, below), (left, right), (0, 0)))


def load(
    source: str | os.PathLike,
    *,
    tree: str = "teacher",
    dtype: Any = jnp.float32,
    uneven: str = "error",
    interpolation: str | None = None,
    num_heads: int | None = None,
    attention: str | None = None,
) -> Model:
    """Loads a model by name, from a file of any public format, or from a run.

    Args:
      source: a name such as "dinov2_vits14" or "dinov2_vitl14_reg" (see `dinov2_jax.hub`); or a
        `.pth`, `.safetensors`, folder of transformers, Orbax checkpoint or workdir. What lies at
        the path goes before what has the name.
      tree: "teacher" or "student": of our checkpoints.
      dtype, uneven, attention: see `Model`.
      interpolation, num_heads: see `dinov2_jax.convert.read_model`.

    Raises:
      FileNotFoundError: neither a path nor a name, or a name whose file is neither here nor to be
        had; the message says what to put where.
      ValueError: the file is damaged, or is not what its name says.
    """
    path = hub.find(source)
    spec, params = read_model(path, tree=tree, interpolation=interpolation, num_heads=num_heads)
    settings = dict(dtype=dtype, uneven=uneven, attention=attention)
    return Model(spec, params, **settings, name=os.fspath(source))


def _sha256(params: Any) -> str:
    digest = hashlib.sha256()
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    for path, leaf in leaves:
        array = np.asarray(leaf)
        digest.update(f"{'/'.join(path_names(path))} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()
