"""The losses as slow plain loops in float64 numpy: the truth that the fast forms are held to.

Written from the paper's formulas and from the behaviour of dinov2/loss/*.py; nothing here shares
a trick (scaling vectors, factored sums, padding) with `dinov2_jax.losses`.
"""

import numpy as np


def sinkhorn_knopp(logits: np.ndarray, temp: float, num_iters: int = 3) -> np.ndarray:
    """`[n, k]` real rows only. The scalar shift cancels in the first division."""
    logits = np.asarray(logits, np.float64)
    num_rows, num_prototypes = logits.shape
    q = np.exp((logits - logits.max()) / temp)
    for _ in range(num_iters):
        for j in range(num_prototypes):
            q[:, j] /= num_prototypes * q[:, j].sum()
        for i in range(num_rows):
            q[i] /= num_rows * q[i].sum()
    return q * num_rows


def softmax(x: np.ndarray) -> np.ndarray:
    """Of one row `[k]`."""
    x = np.asarray(x, np.float64)
    exps = np.exp(x - x.max())
    return exps / exps.sum()


def cross_entropy(target: np.ndarray, logits: np.ndarray, temp: float) -> float:
    """Of one row: `[k]` and `[k]`."""
    probs = softmax(np.asarray(logits, np.float64) / temp)
    return -sum(float(t) * np.log(p) for t, p in zip(target, probs, strict=True))


def dino_local_loss(student_logits, teacher_probs, student_temp: float, num_terms: int) -> float:
    """`[l, b, k]` and `[g, b, k]`."""
    loss = 0.0
    for student in student_logits:
        for teacher in teacher_probs:
            rows = [
                cross_entropy(t, s, student_temp) for t, s in zip(teacher, student, strict=True)
            ]
            loss += np.mean(rows) / num_terms
    return loss


def dino_global_loss(student_logits, teacher_probs, student_temp: float, num_terms: int) -> float:
    """`[g, b, k]` and `[g, b, k]`: pairs of different crops."""
    loss = 0.0
    for s, student in enumerate(student_logits):
        for t, teacher in enumerate(teacher_probs):
            if s != t:
                loss += dino_local_loss([student], [teacher], student_temp, num_terms)
    return loss


def ibot_loss(student_logits, teacher_probs, masks: np.ndarray, student_temp: float) -> float:
    """Rows of the masked patches, in the order of `masks.nonzero()`; masks `[i, n]`."""
    loss, row = 0.0, 0
    for mask in masks:
        for _ in range(mask.sum()):
            ce = cross_entropy(teacher_probs[row], student_logits[row], student_temp)
            loss += ce / mask.sum() / len(masks)
            row += 1
    return loss


def koleo_loss(features: np.ndarray, eps: float = 1e-8) -> float:
    """`[g, s, q, d]`."""
    num_crops, num_groups, group_size, _ = features.shape
    loss = 0.0
    for c in range(num_crops):
        for s in range(num_groups):
            rows = np.asarray(features[c, s], np.float64)
            x = [row / max(np.linalg.norm(row), eps) for row in rows]
            for i in range(group_size):
                others = [j for j in range(group_size) if j != i]
                nearest = max(others, key=lambda j: x[i] @ x[j])
                distance = np.linalg.norm(x[i] - x[nearest] + eps)
                loss -= np.log(distance + eps) / (group_size * num_groups)
    return loss
