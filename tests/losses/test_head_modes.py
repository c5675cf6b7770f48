"""Whole steps in blocks are those with dense heads: every metric and parameter of three."""

import jax
import numpy as np
import pytest

from dinov2_jax.losses.head_modes import BlockHeads, DenseHeads
from dinov2_jax.objective import LossSettings
from tests import tiny

CASES = {
    "sinkhorn": dict(losses={}),
    "softmax, tied": dict(losses=dict(centering="softmax_center"), separate_head=False),
    "dino only, no local crops": dict(losses=dict(ibot_weight=0.0), num_local=0),
    "ibot only": dict(losses=dict(dino_weight=0.0, koleo_weight=0.0)),
    "softmax, in micro-batches": dict(losses=dict(centering="softmax_center"), num_micro_batches=2),
}


def three_steps(heads, *, losses, separate_head=True, num_local=2, num_micro_batches=1):
    network = tiny.make_network(separate_head=separate_head, depth=1)
    # A large eps: Adam must not make full steps out of gradients that are rounding noise.
    optimizer = tiny.make_optimizer_for(network, eps=1e-2)
    state = tiny.make_state(network, optimizer)
    settings = LossSettings(**losses, heads=heads)
    step = jax.jit(
        tiny.make_step(network, optimizer, losses=settings, num_micro_batches=num_micro_batches)
    )
    history = []
    for seed in range(3):
        batch = tiny.make_batch(seed=seed, groups=4, num_local=num_local)
        state, metrics = step(state, batch, tiny.HYPER)
        history.append(metrics)
    return history, state


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_blocks_step_as_dense_heads_do(case):
    # Four blocks of the 16 prototypes.
    history, state = three_steps(BlockHeads(block_size=4), **case)
    dense_history, dense_state = three_steps(DenseHeads(), **{**case, "num_micro_batches": 1})
    for step, (got, want) in enumerate(zip(history, dense_history, strict=True)):
        assert got.keys() == want.keys()
        for name in want:
            np.testing.assert_allclose(
                got[name], want[name], rtol=1e-5, atol=1e-6, err_msg=f"{name} at step {step}"
            )
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(dense_state), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
