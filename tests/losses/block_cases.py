"""Rows and prototypes for the tests of the block forms, and their dense counterparts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dinov2_jax.losses import block_targets, centering, dino
from dinov2_jax.losses.block_cross_entropy import block_cross_entropy
from dinov2_jax.losses.blocks import Prototypes, choose_layout
from dinov2_jax.models.heads import cosine_logits, row_norms

TEMP = 0.05
STUDENT_TEMP = 0.1
TOLERANCE = 1e-5  # float32 sums in another order: of the largest entry, for gradients

same = None  # iBOT: a student's row has its own target


def unit_vectors(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.standard_normal(shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def draw_prototypes(rng: np.random.Generator, k: int, d: int, *, dtype=jnp.float32) -> Prototypes:
    """Directions of any length, and lengths away from their initial 1."""
    weight_v = rng.standard_normal((k, d)).astype(np.float32)
    weight_g = rng.uniform(0.5, 1.5, (k, 1)).astype(np.float32)
    return make_prototypes(weight_v, weight_g, dtype=dtype)


def make_prototypes(weight_v, weight_g, *, dtype=jnp.float32) -> Prototypes:
    return Prototypes(weight_v, weight_g, row_norms(weight_v), jnp.dtype(dtype))


def cross_entropy(logits, targets, temp):
    """Of each row [...], by the formula alone."""
    return -(targets * jax.nn.log_softmax(logits / temp, axis=-1)).sum(axis=-1)


def dense_targets(kind: str, logits, *, center, is_real, temp=TEMP):
    """Probabilities [..., k] of `centering`, over all rows at once."""
    rows = logits.reshape(-1, logits.shape[-1])
    if kind == "softmax_center":
        probs = centering.softmax_center(rows, center, temp)
    else:
        weights = jnp.asarray(is_real, jnp.float32).reshape(-1)
        probs = centering.sinkhorn_knopp(rows, temp, row_weights=weights)
    return probs.reshape(logits.shape)


def to_crops(probs):
    """DINO: two global and three local crops."""
    return dino.targets_of_crops(probs, num_local_crops=3)


def draw(seed=0, *, row_shape, k, dtype=jnp.float32, assign=same, width=8):
    """Student and teacher features and prototypes, real rows and the loss weights of rows."""
    rng = np.random.default_rng(seed)
    student_shape = row_shape if assign is same else (row_shape[0], 5, row_shape[2])
    is_real = rng.random(row_shape) < 0.7 if assign is same else np.ones(row_shape, bool)
    weights = rng.uniform(0, 1, student_shape).astype(np.float32)
    return dict(
        student=unit_vectors(rng, *student_shape, width),
        teacher=unit_vectors(rng, *row_shape, width),
        student_prototypes=draw_prototypes(rng, k, width, dtype=dtype),
        teacher_prototypes=draw_prototypes(rng, k, width, dtype=dtype),
        center=rng.uniform(-0.3, 0.3, k).astype(np.float32),
        is_real=is_real,
        weights=weights * is_real if assign is same else weights,
    )


def head_logits(prototypes, features):
    """As the head's last layer has them, through which the norms are differentiated too."""
    directions, lengths = prototypes.weight_v, prototypes.weight_g
    return cosine_logits(features, directions, lengths, dtype=prototypes.dtype)


def dense_loss(student, prototypes, case, *, kind, assign, logits=head_logits):
    teacher_logits = case["teacher_prototypes"].logits(case["teacher"])
    probs = dense_targets(kind, teacher_logits, center=case["center"], is_real=case["is_real"])
    loss = cross_entropy(
        logits(prototypes, student), assign(probs) if assign else probs, STUDENT_TEMP
    )
    return (case["weights"] * loss).sum()


def block_loss(student, prototypes, case, *, kind, assign, block_size=4, has_kernels=False):
    teacher, teacher_prototypes = case["teacher"], case["teacher_prototypes"]
    k, width = prototypes.weight_v.shape
    layout = choose_layout(
        teacher.shape[:-1], k, width=width, block_size=block_size, has_kernels=has_kernels
    )
    if kind == "softmax_center":
        targets = block_targets.softmax_center(
            teacher, teacher_prototypes, case["center"], TEMP, layout=layout
        )
    else:
        targets = block_targets.sinkhorn_knopp(
            teacher, teacher_prototypes, TEMP, is_real=case["is_real"], num_iters=3, layout=layout
        )
    temps = (STUDENT_TEMP, TEMP)
    loss, entropy = block_cross_entropy(layout, assign, student, prototypes, *targets, temps)
    return (case["weights"] * loss).sum(), entropy


@functools.cache
def _compiled(function, **settings):
    run = functools.partial(function, **settings)
    return jax.jit(jax.value_and_grad(run, (0, 1), has_aux=function is block_loss))


def value_and_grads(function, case, **settings):
    has_aux = function is block_loss
    value, grads = _compiled(function, **settings)(
        case["student"], case["student_prototypes"], case
    )
    features, prototypes = grads
    return (value[0] if has_aux else value), [features, prototypes.weight_v, prototypes.weight_g]


def assert_same(got, want, tolerance=TOLERANCE):
    np.testing.assert_allclose(got[0], want[0], rtol=tolerance)
    for name, left, right in zip(
        ("features", "weight_v", "weight_g"), got[1], want[1], strict=True
    ):
        scale = np.abs(right).max()
        np.testing.assert_allclose(left, right, rtol=0, atol=tolerance * scale, err_msg=name)
