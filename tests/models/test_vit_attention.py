"""The attention of CLS is what the blocks compute: by their own functions, and by hand."""

import functools

import jax
import numpy as np
import pytest
from scipy.special import erf, softmax

from dinov2_jax.models import attention
from dinov2_jax.models.block import Block
from tests.models.test_vit import make, make_images, make_params

DEPTH, HEADS, REGISTERS = 3, 2, 2


@pytest.fixture(scope="module")
def network():
    model = make(depth=DEPTH, num_register_tokens=REGISTERS)
    return model, make_params(model), make_images(2, 8, 12, 3)


def cls_attention(network, block: int) -> np.ndarray:
    model, params, images = network
    apply = functools.partial(model.apply, block=block, method="cls_attention")
    return np.asarray(jax.jit(apply)(params, images))


def params_of(network, block: int) -> dict:
    return jax.tree.map(lambda a: a[block], network[1]["params"]["blocks"])


def before(network, block: int) -> np.ndarray:
    """Tokens that a block gets, by running the ones before it one after another, unscanned."""
    model, params, images = network
    x = model.apply(params, images, None, method="embed")
    for i in range(block):
        ((x,), _), _ = Block(HEADS, layer_scale_init=1.0).apply(
            {"params": params_of(network, i)}, ((x,), None), None, None
        )
    return x


@pytest.mark.parametrize("block", range(DEPTH))
def test_it_equals_what_the_block_itself_computes(network, block, monkeypatch):
    x, seen = before(network, block), []
    original = attention.attention_probs

    def record(q, k):
        seen.append(original(q, k))
        return seen[-1]

    monkeypatch.setattr(attention, "attention_probs", record)
    Block(HEADS, layer_scale_init=1.0).apply(
        {"params": params_of(network, block)}, ((x,), None), None, None
    )
    (probs,) = seen
    ours = cls_attention(network, block)
    assert ours.shape == (2, HEADS, 1 + REGISTERS + 6) and ours.dtype == np.float32
    # Queries of one token or of all: XLA may sum in another order.
    np.testing.assert_allclose(ours, probs[:, :, 0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(ours.sum(axis=-1), 1, atol=1e-6)


def layer_norm(x, params):
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
    return x * params["scale"] + params["bias"]


def dense(x, params):
    return x @ params["kernel"] + params["bias"]


def test_it_equals_numpy_in_double_precision(network):
    """The whole network by hand from its parameters: a wrong block or a wrong token would show."""
    x = np.asarray(before(network, 0), np.float64)
    hd = x.shape[-1] // HEADS
    for block in range(DEPTH):
        params = jax.tree.map(lambda a: np.asarray(a, np.float64), params_of(network, block))
        q, k, v = np.split(dense(layer_norm(x, params["norm1"]), params["attn"]["qkv"]), 3, axis=-1)
        out = np.zeros_like(x)
        for head in range(HEADS):
            part = slice(head * hd, (head + 1) * hd)
            logits = q[..., part] @ k[..., part].swapaxes(1, 2) / np.sqrt(hd)
            probs = softmax(logits, axis=-1)
            np.testing.assert_allclose(
                cls_attention(network, block)[:, head], probs[:, 0], rtol=1e-3, atol=1e-6
            )
            out[..., part] = probs @ v[..., part]
        x = x + params["ls1"]["gamma"] * dense(out, params["attn"]["proj"])
        hidden = dense(layer_norm(x, params["norm2"]), params["mlp"]["fc1"])
        hidden = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2)))
        x = x + params["ls2"]["gamma"] * dense(hidden, params["mlp"]["fc2"])


@pytest.mark.parametrize("block", [-1, DEPTH])
def test_blocks_that_do_not_exist(network, block):
    with pytest.raises(ValueError, match=rf"block={block} must be one of 0\.\.2"):
        cls_attention(network, block)
