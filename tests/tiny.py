"""A network, batches and a step small enough for every test that needs a whole one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dinov2_jax.data.batch import AUGMENT_COLUMNS
from dinov2_jax.models.heads import DINOHead
from dinov2_jax.models.vit import VisionTransformer
from dinov2_jax.objective import LossSettings
from dinov2_jax.optim.optimizer import make_optimizer
from dinov2_jax.optim.param_groups import parameter_groups
from dinov2_jax.optim.schedules import Hyperparameters
from dinov2_jax.train_state import Network, init_state
from dinov2_jax.train_step import make_train_step

PATCH, GLOBAL_PX, LOCAL_PX, NUM_LOCAL, NUM_PROTOTYPES = 7, 28, 14, 3, 16
IMAGE_SHAPE = (GLOBAL_PX, GLOBAL_PX, 3)

HYPER = Hyperparameters(
    learning_rate=np.float32(1e-3),
    last_layer_learning_rate=np.float32(1e-3),
    weight_decay=np.float32(0.1),
    teacher_momentum=np.float32(0.9),
    teacher_temp=np.float32(0.07),
)


def normalise(crops: jax.Array, parameters: jax.Array) -> jax.Array:
    """Stands in for augmentation: to about zero mean and unit variance, nothing else."""
    del parameters
    return (crops.astype(jnp.float32) - 127.5) / 64.0


def make_network(*, separate_head: bool = True, **backbone) -> Network:
    """A two-block transformer of width 32 with both heads."""
    settings = dict(
        patch_size=PATCH,
        embed_dim=32,
        depth=2,
        num_heads=2,
        layer_scale_init=1.0,  # at 1e-5 all CLS tokens nearly coincide: KoLeo is ill-conditioned
        pos_embed_grid=(GLOBAL_PX // PATCH, GLOBAL_PX // PATCH),
    )
    head = functools.partial(
        DINOHead, num_prototypes=NUM_PROTOTYPES, hidden_dim=32, bottleneck_dim=8
    )
    return Network(
        backbone=VisionTransformer(**(settings | backbone)),
        dino_head=head(),
        ibot_head=head() if separate_head else None,
    )


def make_optimizer_for(network: Network, *, image_shape=IMAGE_SHAPE, **settings):
    """The reference's AdamW with parameter groups for `network`."""
    params = jax.eval_shape(
        functools.partial(network.init, image_shape=image_shape), jax.random.key(0)
    )
    groups = parameter_groups(params, layerwise_lr_decay=0.9, patch_embed_lr_multiplier=0.2)
    settings = dict(b1=0.9, b2=0.999, eps=1e-8, clip_norm=3.0) | settings
    return make_optimizer(
        **settings,
        lr_multipliers=groups.lr_multiplier,
        wd_multipliers=groups.wd_multiplier,
        is_last_layer=groups.is_last_layer,
    )


def make_batch(
    *, seed: int = 0, groups: int = 8, group_size: int = 2, num_local: int = NUM_LOCAL
) -> dict[str, np.ndarray]:
    """Device fields of a batch: noise images, half of the crops masked."""
    rng = np.random.default_rng(seed)
    b, num_patches = groups * group_size, (GLOBAL_PX // PATCH) ** 2
    num_crops, slots = 2 * group_size, 2 * group_size * num_patches // 2
    masks = np.zeros((groups, num_crops, num_patches), bool)
    for s in range(groups):
        for crop in rng.permutation(num_crops)[: num_crops // 2]:
            hidden = rng.permutation(num_patches)[: rng.integers(1, num_patches // 2)]
            masks[s, crop, hidden] = True
    indices = np.zeros((groups, slots), np.int32)
    weights = np.zeros((groups, slots), np.float32)
    for s in range(groups):
        tokens = np.flatnonzero(masks[s])
        indices[s, : len(tokens)] = tokens
        weights[s, : len(tokens)] = 1.0 / masks[s].sum(axis=1)[tokens // num_patches]
    columns = len(AUGMENT_COLUMNS)
    return {
        "global_crops": rng.integers(0, 256, (b, 2, *IMAGE_SHAPE), np.uint8),
        "local_crops": rng.integers(0, 256, (b, num_local, LOCAL_PX, LOCAL_PX, 3), np.uint8),
        "global_augment": np.zeros((b, 2, columns), np.float32),
        "local_augment": np.zeros((b, num_local, columns), np.float32),
        "masks": masks,
        "mask_indices": indices,
        "mask_weights": weights,
    }


def make_state(network: Network, optimizer, *, seed: int = 0, image_shape=IMAGE_SHAPE):
    """A fresh train state."""
    init = functools.partial(
        init_state, network=network, optimizer=optimizer, image_shape=image_shape
    )
    return jax.jit(init)(jax.random.key(seed))


def make_step(network: Network, optimizer, *, losses: LossSettings | None = None, **settings):
    """The train step, not yet jitted."""
    return make_train_step(
        network=network,
        optimizer=optimizer,
        losses=losses or LossSettings(),
        augment=settings.pop("augment", normalise),
        seed=0,
        **settings,
    )
