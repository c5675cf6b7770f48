"""What both sides of the whole-step comparison start from: recipes, weights, batches, schedules."""

import dataclasses
import functools

import jax
import numpy as np

from dinov2_jax.data.batch import AUGMENT_COLUMNS
from dinov2_jax.models.heads import DINOHead
from dinov2_jax.models.vit import VisionTransformer
from dinov2_jax.optim.schedules import Hyperparameters
from dinov2_jax.train_state import Network

PATCH, GLOBAL_PX, LOCAL_PX, NUM_LOCAL = 14, 56, 28, 2
NUM_GROUPS, GROUP_SIZE, NUM_STEPS = 2, 4, 5
WIDTH, DEPTH, NUM_HEADS = 48, 3, 3
DINO_HEAD = dict(num_prototypes=64, hidden_dim=48, bottleneck_dim=24)
IBOT_HEAD = dict(num_prototypes=56, hidden_dim=48, bottleneck_dim=16)
KOLEO_WEIGHT, LAYERWISE_LR_DECAY, PATCH_EMBED_LR_MULTIPLIER = 0.1, 0.9, 0.2
FROZEN_STEPS = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """One of the reference's two recipes."""

    centering: str
    is_tied: bool
    # Amid the backbone's gradient norms, which fall: it is clipped at first and then no more. Were
    # it always clipped, or never, Adam would not tell.
    clip_norm: float


CASES = {
    "sinkhorn, untied": Case("sinkhorn_knopp", is_tied=False, clip_norm=4.0),
    "softmax, tied": Case("softmax_center", is_tied=True, clip_norm=4.0),
}


def hyperparameters(step: int) -> Hyperparameters:
    """High rates, so that five steps move the weights well beyond rounding."""
    learning_rate = 1e-3 * (1 + 0.3 * step)
    return Hyperparameters(
        learning_rate=np.float32(learning_rate),
        last_layer_learning_rate=np.float32(0 if step < FROZEN_STEPS else learning_rate),
        weight_decay=np.float32(0.5 + 0.1 * step),
        teacher_momentum=np.float32(0.9),
        teacher_temp=np.float32(0.05 + 0.004 * step),
    )


def make_batch(step: int) -> dict[str, np.ndarray]:
    """Device fields of a batch; every group has unmasked crops, and its own number of tokens."""
    rng = np.random.default_rng(step)
    b, n = NUM_GROUPS * GROUP_SIZE, (GLOBAL_PX // PATCH) ** 2
    num_crops, slots = 2 * GROUP_SIZE, 40
    masks = np.zeros((NUM_GROUPS, num_crops, n), bool)
    indices = np.zeros((NUM_GROUPS, slots), np.int32)
    weights = np.zeros((NUM_GROUPS, slots), np.float32)
    for s in range(NUM_GROUPS):
        for crop in rng.permutation(num_crops)[: num_crops // 2]:
            masks[s, crop, rng.permutation(n)[: rng.integers(1, 9)]] = True
        tokens = np.flatnonzero(masks[s])
        indices[s, : len(tokens)] = tokens
        weights[s, : len(tokens)] = 1 / masks[s].sum(axis=1)[tokens // n]
    # A tint for each image and crop besides the noise: crops that a network can tell apart.
    tint = rng.integers(-90, 90, (b, 2 + NUM_LOCAL, 1, 1, 3))
    pixels = [
        np.clip(rng.integers(60, 196, (b, v, px, px, 3)) + part, 0, 255).astype(np.uint8)
        for v, px, part in ((2, GLOBAL_PX, tint[:, :2]), (NUM_LOCAL, LOCAL_PX, tint[:, 2:]))
    ]
    return {
        "global_crops": pixels[0],
        "local_crops": pixels[1],
        "global_augment": np.zeros((b, 2, len(AUGMENT_COLUMNS)), np.float32),
        "local_augment": np.zeros((b, NUM_LOCAL, len(AUGMENT_COLUMNS)), np.float32),
        "masks": masks,
        "mask_indices": indices,
        "mask_weights": weights,
    }


def normalise(crops, parameters=None):
    """In place of the augmentation, on both sides."""
    del parameters
    return (crops.astype(np.float32) - 127.5) / 64


def make_network(case: Case) -> Network:
    return Network(
        backbone=VisionTransformer(
            patch_size=PATCH,
            embed_dim=WIDTH,
            depth=DEPTH,
            num_heads=NUM_HEADS,
            layer_scale_init=1.0,
            pos_embed_grid=(GLOBAL_PX // PATCH, GLOBAL_PX // PATCH),
        ),
        dino_head=DINOHead(**DINO_HEAD),
        ibot_head=None if case.is_tied else DINOHead(**IBOT_HEAD),
    )


@functools.cache
def start_params(case: Case) -> dict:
    """Noise on every parameter; around 1 where a fresh network has ones."""
    init = functools.partial(make_network(case).init, image_shape=(GLOBAL_PX, GLOBAL_PX, 3))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        center = path[-1].key in ("scale", "gamma", "weight_g")
        return (center + 0.06 * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, jax.random.key(0)))
