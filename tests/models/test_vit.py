"""The transformer as a module: shapes, the released sizes, masks, stochastic depth, precision."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax.models.block import choose_backward_kernels, choose_remat
from dinov2_jax.models.vit import VARIANTS, VisionTransformer

TINY = dict(patch_size=4, embed_dim=16, depth=2, num_heads=2, pos_embed_grid=(3, 3))


def make(**settings) -> VisionTransformer:
    return VisionTransformer(**{**TINY, "layer_scale_init": 1.0, **settings})


def make_params(model: VisionTransformer, scale: float = 0.3) -> dict:
    """Random parameters, nothing at 0 or 1."""
    shapes = parameter_shapes(model)
    rng = np.random.default_rng(0)
    return {
        "params": jax.tree.map(
            lambda s: np.float32(scale) * rng.standard_normal(s.shape, np.float32), shapes
        )
    }


def parameter_shapes(model: VisionTransformer) -> dict:
    side = 2 * model.patch_size
    images = jax.ShapeDtypeStruct((1, side, side, model.in_channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def make_images(*shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def apply(model, params, *args, **kwargs):
    """Applies the model, compiled: much quicker than one operation at a time."""
    return jax.jit(functools.partial(model.apply, **kwargs))(params, *args)


@pytest.mark.parametrize(
    ("variant", "num_parameters", "num_tensors"),
    [
        ("vit_small", 22_056_576, 175),
        ("vit_base", 86_580_480, 175),
        ("vit_large", 304_368_640, 343),
        ("vit_giant2", 1_136_480_768, 567),
    ],
)
@pytest.mark.parametrize("num_register_tokens", [0, 4])
def test_released_sizes(variant, num_parameters, num_tensors, num_register_tokens):
    sizes = VARIANTS[variant]
    model = VisionTransformer(
        patch_size=14,
        pos_embed_grid=(37, 37),
        num_register_tokens=num_register_tokens,
        **sizes,
    )
    leaves = jax.tree_util.tree_leaves_with_path(parameter_shapes(model))
    extra = num_register_tokens * sizes["embed_dim"]
    assert sum(leaf.size for _, leaf in leaves) == num_parameters + extra
    stacked = [leaf for path, leaf in leaves if path[0].key == "blocks"]
    assert all(leaf.shape[0] == sizes["depth"] for leaf in stacked)
    count = len(leaves) + len(stacked) * (sizes["depth"] - 1)
    assert count == num_tensors + (num_register_tokens > 0)


def test_paper_depth_and_scratch_large_are_one_field_away():
    base = VisionTransformer(
        patch_size=14, pos_embed_grid=(37, 37), **{**VARIANTS["vit_base"], "depth": 18}
    )
    large = VisionTransformer(
        patch_size=14, pos_embed_grid=(16, 16), **{**VARIANTS["vit_large"], "ffn": "swiglu"}
    )
    count = lambda model: sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(model)))  # noqa: E731
    assert count(base) == 129_116_928
    # 304,794,880 with the 37 x 37 table of released weights.
    assert count(large) == 304_794_880 - (37**2 - 16**2) * 1024


def test_outputs_and_their_shapes():
    model = make(num_register_tokens=3, in_channels=1)
    output = apply(model, make_params(model), make_images(2, 8, 20, 1))
    assert output.cls.shape == (2, 16)
    assert output.registers.shape == (2, 3, 16)
    assert output.patches.shape == (2, 10, 16)


def test_a_tuple_of_images_is_the_same_as_one_at_a_time():
    model = make()
    params = make_params(model)
    images = (make_images(2, 12, 12, 3), make_images(3, 8, 4, 3, seed=1))
    masks = (make_images(2, 9) > 0, None)
    together = apply(model, params, images, masks)
    assert isinstance(together, tuple)
    for one, mask, output in zip(images, masks, together, strict=True):
        alone = apply(model, params, one, mask)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), alone, output)


def test_a_masked_patch_is_not_seen():
    model = make()
    params = make_params(model)
    images = make_images(1, 8, 8, 3)
    changed = images.copy()
    changed[:, 4:, :4] += 1.0  # patch 2 of the 2 x 2 grid
    run = jax.jit(model.apply)
    mask = np.array([[False, False, True, False]])
    seen, unseen = run(params, images, mask), run(params, changed, mask)
    jax.tree.map(np.testing.assert_array_equal, seen, unseen)
    wrong_mask = np.array([[False, True, False, False]])
    assert np.abs(run(params, images, wrong_mask).cls - seen.cls).max() > 1e-3
    assert np.abs(run(params, changed, wrong_mask).cls - seen.cls).max() > 1e-3


def test_initial_values():
    model = make(
        embed_dim=64, num_register_tokens=2, pos_embed_grid=(16, 16), layer_scale_init=1e-5
    )
    params = jax.jit(model.init)(jax.random.key(0), make_images(1, 8, 8, 3))["params"]
    assert 0 < np.abs(params["cls_token"]).max() < 6e-6
    np.testing.assert_allclose(params["register_tokens"].std(), 1e-6, rtol=0.3)
    np.testing.assert_allclose(params["pos_embed"].std(), 0.02, rtol=0.03)
    np.testing.assert_array_equal(params["mask_token"], 0)
    blocks = params["blocks"]
    for norm in (blocks["norm1"], blocks["norm2"], params["norm"]):
        np.testing.assert_array_equal(norm["scale"], 1)
        np.testing.assert_array_equal(norm["bias"], 0)
    for name in ("ls1", "ls2"):
        np.testing.assert_array_equal(blocks[name]["gamma"], np.float32(1e-5))
    first, second = blocks["attn"]["qkv"]["kernel"]
    np.testing.assert_allclose(first.std(), 0.02, rtol=0.03)
    assert np.abs(first - second).max() > 0.01, "blocks start alike"


class TestIntermediateLayers:
    """The reference's choice of blocks: how many of the last, or which."""

    model = make(depth=3, num_register_tokens=1)
    images = make_images(2, 8, 8, 3)

    def outputs(self, layers, **kwargs):
        params = make_params(self.model)
        method = dict(method="intermediate_layers", layers=layers)
        return apply(self.model, params, self.images, **method, **kwargs)

    def test_last_one_is_the_output(self):
        (last,) = self.outputs(1)
        output = apply(self.model, make_params(self.model), self.images)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), last, output)

    def test_number_and_list_agree_and_come_in_the_order_of_the_blocks(self):
        both, swapped = self.outputs(2), self.outputs([2, 1])
        assert len(both) == 2
        jax.tree.map(np.testing.assert_array_equal, both, swapped)
        shallow = make(depth=2, num_register_tokens=1)
        params = make_params(self.model)["params"]
        params = {**params, "blocks": jax.tree.map(lambda leaf: leaf[:2], params["blocks"])}
        output = apply(shallow, {"params": params}, self.images)
        np.testing.assert_allclose(both[0].patches, output.patches, atol=1e-5)

    def test_norm_is_the_final_one(self):
        (raw,), (normed,) = self.outputs([0], norm=False), self.outputs([0])
        norm = make_params(self.model)["params"]["norm"]
        centred = raw.cls - raw.cls.mean(axis=-1, keepdims=True)
        expected = centred / np.sqrt(raw.cls.var(axis=-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(normed.cls, expected * norm["scale"] + norm["bias"], atol=1e-5)

    @pytest.mark.parametrize("layers", [0, 4, [3], [-1], [1, 1], []])
    def test_blocks_that_are_not_there(self, layers):
        with pytest.raises(ValueError, match=r"layers=.* must be different blocks of 0\.\.2"):
            self.outputs(layers)


def test_auto_remat_follows_the_devices():
    policies = {platform: choose_remat("auto", platform) for platform in ("cpu", "gpu", "tpu")}
    assert policies == {"cpu": "dots", "gpu": "none", "tpu": "branches"}
    assert choose_remat("none", "cpu") == "none"


def test_auto_keeps_kernels_by_the_chip():
    kinds = ("cpu", "TPU v4", "TPU v5 lite", "TPU v6 lite", "TPU7x", "NVIDIA H200")
    kept = [choose_backward_kernels("auto", kind) for kind in kinds]
    assert kept == ["gather", "keep", "gather", "keep", "keep", "keep"]
    assert choose_backward_kernels("gather", "TPU v4") == "gather"
    assert choose_backward_kernels("keep", "cpu") == "keep"


def test_remat_changes_memory_only():
    images, key = make_images(8, 16, 16, 3), jax.random.key(0)

    def compiled_gradient(remat):
        model = make(depth=3, drop_path_rate=0.3, drop_path_mode="bernoulli", remat=remat)

        def loss(params):
            return jnp.sum(
                model.apply(params, images, train=True, rngs={"drop_path": key}).cls ** 2
            )

        return jax.jit(jax.grad(loss)).lower(make_params(make(depth=3))).compile()

    gradients = {
        remat: compiled_gradient(remat) for remat in ("none", "dots", "branches", "blocks")
    }
    memory = [f.memory_analysis().temp_size_in_bytes for f in gradients.values()]
    assert all(more > 1.2 * less for more, less in itertools.pairwise(memory)), memory
    expected, *others = (f(make_params(make(depth=3))) for f in gradients.values())
    for other in others:
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), expected, other
        )


# 3 of 4 blocks: the last turn is shorter than the others.
@pytest.mark.parametrize(("mode", "scan_unroll"), [("subset", 2), ("bernoulli", 3)])
def test_unrolled_scan_is_the_same_with_its_gradients(mode, scan_unroll):
    """Stochastic depth draws for a block the same in whichever turn the block is."""
    images = make_images(6, 8, 8, 3)
    settings = dict(depth=4, drop_path_rate=0.4, drop_path_mode=mode)
    params = make_params(make(**settings))

    def compiled(scan_unroll):
        model = make(**settings, scan_unroll=scan_unroll)

        def loss(params, key):
            out = model.apply(params, images, train=True, rngs={"drop_path": key})
            return jnp.sum(out.cls**3) + jnp.sum(out.patches**2), (out.cls, out.patches)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    key, run = jax.random.key(0), compiled(1)
    want, got = run(params, key), compiled(scan_unroll)(params, key)
    for ours, right in zip(got[0][1], want[0][1], strict=True):
        np.testing.assert_allclose(ours, right, atol=1e-5)
    for ours, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-5 * np.abs(right).max())
    (other, _), _ = run(params, jax.random.key(1))
    assert abs(other / want[0][0] - 1) > 1e-3  # the draws matter


def test_bfloat16_stays_close_and_float32_where_it_must_be():
    model = make(embed_dim=32, num_register_tokens=2)
    low = model.clone(dtype=jnp.bfloat16)
    params = make_params(model, scale=0.1)
    images = make_images(2, 12, 12, 3)
    output, exact = apply(low, params, images), apply(model, params, images)
    for ours, theirs in zip(jax.tree.leaves(output), jax.tree.leaves(exact), strict=True):
        assert ours.dtype == jnp.bfloat16
        assert theirs.dtype == jnp.float32
        error = np.abs(np.float32(ours) - theirs)
        assert error.max() < 0.05 * np.abs(theirs).max()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(parameter_shapes(low)))


def test_errors():
    model = make()
    params = make_params(model)
    with pytest.raises(
        ValueError, match=r"height=10 and width=8 must be multiples of patch_size=4"
    ):
        model.apply(params, make_images(1, 10, 8, 3))
    with pytest.raises(ValueError, match=r"images have 1 channels but in_channels=3"):
        model.apply(params, make_images(1, 8, 8, 1))
    with pytest.raises(ValueError, match=r"mask.shape=\(1, 3\) must be \[b, n\] = \(1, 4\)"):
        model.apply(params, make_images(1, 8, 8, 3), np.zeros((1, 3), bool))
    with pytest.raises(
        ValueError, match=r"remat='full' must be one of \('none', 'dots', 'branches', 'blocks'"
    ):
        make(remat="full").apply(params, make_images(1, 8, 8, 3))
    with pytest.raises(ValueError, match=r"layer_scale_init=0 must be above 0"):
        make(layer_scale_init=0).apply(params, make_images(1, 8, 8, 3))


def test_every_layer_of_a_block_has_the_form_of_products():
    text = {}
    for form in ("plain", "flat", "transposed"):
        model = make(product_form=form)
        params = {"params": parameter_shapes(model)}
        text[form] = str(jax.make_jaxpr(model.apply)(params, jnp.zeros((1, 8, 8, 3))))
    # Of four layers, which are each traced twice.
    assert [text[form].count("name=cpu_product") for form in text] == [0, 0, 8]
    assert text["plain"] != text["flat"]
