"""Whole steps in blocks are those with dense heads: every metric and parameter of three."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from dinov2_jax.losses import head_modes
from dinov2_jax.losses.head_modes import BlockHeads, DenseHeads
from dinov2_jax.models.vit import BackboneOutput
from dinov2_jax.objective import LossSettings
from tests import tiny


class OneLayer(nn.Module):
    """In place of a transformer, for compilation's sake: features of patches, and their mean."""

    embed_dim: int = 16

    def setup(self):
        self.proj = nn.Dense(self.embed_dim)

    def __call__(self, images, masks=None, *, train=False, num_groups=1):
        if isinstance(images, tuple):
            return [self.embed(*each) for each in zip(images, masks, strict=True)]
        return self.embed(images, masks)

    def embed(self, images, masks):
        pixels = rearrange(images, "b (h p) (w r) c -> b (h w) (p r c)", p=tiny.PATCH, r=tiny.PATCH)
        patches = self.proj(pixels)
        if masks is not None:
            patches = jnp.where(masks[:, :, None], 0.1, patches)
        return BackboneOutput(cls=patches.mean(axis=1), registers=patches[:, :0], patches=patches)


CASES = {
    "sinkhorn, in micro-batches": dict(losses={}, num_micro_batches=2),
    "softmax, tied, no local crops": dict(
        losses=dict(centering="softmax_center"), separate_head=False, num_local=0
    ),
    "dino only": dict(losses=dict(ibot_weight=0.0)),
    "ibot only": dict(losses=dict(dino_weight=0.0)),
}


def three_steps(heads, *, losses, separate_head=True, num_local=3, num_micro_batches=1):
    network = tiny.make_network(separate_head=separate_head)
    network = dataclasses.replace(network, backbone=OneLayer())
    # A large eps: Adam must not make full steps out of gradients that are rounding noise.
    optimizer = tiny.make_optimizer_for(network, eps=1e-2)
    state = tiny.make_state(network, optimizer)
    # Away from the start, where the head normalises near-zeros: gradients of 1e3 amplify rounding.
    params = {
        name: {**module, "mlp": jax.tree.map(lambda x: 10 * x, module["mlp"])}
        if "mlp" in module
        else module
        for name, module in state.student.items()
    }
    state = state.replace(student=params, teacher=params)
    # Without KoLeo, which has no head: one layer's features nearly coincide, and it amplifies.
    settings = LossSettings(**losses, koleo_weight=0.0, heads=heads)
    step = jax.jit(
        tiny.make_step(network, optimizer, losses=settings, num_micro_batches=num_micro_batches)
    )
    history = []
    for seed in range(3):
        batch = tiny.make_batch(seed=seed, groups=4, num_local=num_local)
        state, metrics = step(state, batch, tiny.HYPER)
        history.append(metrics)
    return history, state


@pytest.mark.parametrize("has_kernels", [False, True], ids=["blocks", "kernels"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_blocks_step_as_dense_heads_do(case, has_kernels):
    # Four blocks of the 16 prototypes; kernels are interpreted.
    history, state = three_steps(BlockHeads(block_size=4, has_kernels=has_kernels), **case)
    dense_history, dense_state = three_steps(DenseHeads(), **{**case, "num_micro_batches": 1})
    for step, (got, want) in enumerate(zip(history, dense_history, strict=True)):
        assert got.keys() == want.keys()
        for name in want:
            np.testing.assert_allclose(
                got[name], want[name], rtol=1e-5, atol=1e-6, err_msg=f"{name} at step {step}"
            )
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(dense_state), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    ("heads", "platform", "logit_bytes", "memory_bytes", "expected"),
    [
        ("auto", "cpu", head_modes.MAX_DENSE_BYTES, None, DenseHeads()),
        ("auto", "cpu", head_modes.MAX_DENSE_BYTES + 1, None, BlockHeads(8)),
        ("auto", "gpu", head_modes.MAX_DENSE_BYTES + 1, None, BlockHeads(8)),
        ("auto", "gpu", 10 * 2**30, 80 * 2**30, DenseHeads()),
        ("auto", "gpu", 10 * 2**30 + 1, 80 * 2**30, BlockHeads(8)),
        ("auto", "tpu", 2**40, None, BlockHeads(8, has_kernels=True)),
        ("pallas", "tpu", 0, None, BlockHeads(8, has_kernels=True)),
        ("blocks", "tpu", 0, None, BlockHeads(8)),
        ("dense", "tpu", 2**40, None, DenseHeads()),
        ("dense", "gpu", 2**40, 80 * 2**30, DenseHeads()),
        ("blocks", "cpu", 0, None, BlockHeads(8)),
    ],
)
def test_the_choice(heads, platform, logit_bytes, memory_bytes, expected):
    got = head_modes.choose_head_mode(
        heads,
        platform=platform,
        logit_bytes=logit_bytes,
        memory_bytes=memory_bytes,
        block_size=8,
    )
    assert got == expected


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_kernels_need_a_tpu(platform):
    with pytest.raises(ValueError, match=f"heads='pallas' needs a TPU, not {platform}; use 'auto'"):
        head_modes.choose_head_mode("pallas", platform=platform, logit_bytes=0, memory_bytes=None)
