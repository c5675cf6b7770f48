"""Five optimizer steps of `dinov2_jax.train_step`, and the same five of the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange

from dinov2_jax import train_step
from dinov2_jax.convert.state_dict import to_reference
from dinov2_jax.losses.head_modes import DenseHeads, HeadMode
from dinov2_jax.objective import LossSettings
from dinov2_jax.optim import optimizer as optim
from dinov2_jax.optim.param_groups import ParamGroups, parameter_groups
from dinov2_jax.train_state import TrainState
from tests.parity import require
from tests.reference.process_group import one_process_group
from tests.reference.step_case import (
    DEPTH,
    DINO_HEAD,
    GLOBAL_PX,
    IBOT_HEAD,
    KOLEO_WEIGHT,
    LAYERWISE_LR_DECAY,
    NUM_GROUPS,
    NUM_HEADS,
    NUM_LOCAL,
    NUM_STEPS,
    PATCH,
    PATCH_EMBED_LR_MULTIPLIER,
    WIDTH,
    Case,
    hyperparameters,
    make_batch,
    make_network,
    normalise,
    start_params,
)

DENSE = DenseHeads()


@dataclasses.dataclass
class Run:
    """What a run of either side leaves behind, in the reference's names."""

    terms: list[dict[str, float]]
    student: dict[str, np.ndarray]
    teacher: dict[str, np.ndarray]
    centers: dict[str, np.ndarray]


def make_groups(case: Case) -> ParamGroups:
    return parameter_groups(
        start_params(case),
        layerwise_lr_decay=LAYERWISE_LR_DECAY,
        patch_embed_lr_multiplier=PATCH_EMBED_LR_MULTIPLIER,
    )


def compile_step(case: Case, heads: HeadMode = DENSE):
    """The step under test, with the multipliers as inputs: `(state, batch, hyper, lr, wd)`.

    As inputs, so that planting mistakes in them costs no compilation.
    """

    def step(state, batch, hyper, lr_multipliers, wd_multipliers):
        optimizer = optim.make_optimizer(
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            clip_norm=case.clip_norm,
            lr_multipliers=lr_multipliers,
            wd_multipliers=wd_multipliers,
            is_last_layer=make_groups(case).is_last_layer,
        )
        one_step = train_step.make_train_step(
            network=make_network(case),
            optimizer=optimizer,
            losses=LossSettings(centering=case.centering, koleo_weight=KOLEO_WEIGHT, heads=heads),
            augment=normalise,
            seed=0,
        )
        return one_step(state, batch, hyper)

    return jax.jit(step)


@functools.cache
def plain_step(case: Case, heads: HeadMode = DENSE):
    """The step without mistakes, compiled once."""
    return compile_step(case, heads)


def run_ours(
    case: Case, *, step=None, change_hyper=lambda hyper: hyper, change_groups=lambda groups: groups
) -> Run:
    """Five steps; the arguments plant mistakes."""
    step = step or plain_step(case)
    groups = change_groups(make_groups(case))
    params = start_params(case)
    patch_head = DINO_HEAD if case.is_tied else IBOT_HEAD
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        student=params,
        teacher=params,
        opt_state=optax.scale_by_adam().init(params),
        centers={
            "dino": jnp.zeros(DINO_HEAD["num_prototypes"]),
            "ibot": jnp.zeros(patch_head["num_prototypes"]),
        },
    )
    terms = []
    for i in range(NUM_STEPS):
        hyper = change_hyper(hyperparameters(i))
        state, metrics = step(
            state, make_batch(i), hyper, groups.lr_multiplier, groups.wd_multiplier
        )
        terms.append({name: float(value) for name, value in metrics.items()})
    return Run(
        terms=terms,
        student=to_reference(jax.tree.map(np.asarray, state.student)),
        teacher=to_reference(jax.tree.map(np.asarray, state.teacher)),
        centers={name: np.asarray(center) for name, center in state.centers.items()},
    )


@functools.cache
def plain_run(case: Case, heads: HeadMode = DENSE) -> Run:
    return run_ours(case, step=plain_step(case, heads))


@functools.cache
def run_reference(case: Case) -> Run:
    """The same steps in PyTorch."""
    torch, torch_step = require("torch", "tests.reference.torch_step")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # far quicker at this size
    heads = [
        dict(
            in_dim=WIDTH,
            out_dim=head["num_prototypes"],
            hidden_dim=head["hidden_dim"],
            bottleneck_dim=head["bottleneck_dim"],
        )
        for head in (DINO_HEAD, IBOT_HEAD)
    ]
    reference = torch_step.TorchStep(
        backbone=dict(
            img_size=GLOBAL_PX,
            patch_size=PATCH,
            embed_dim=WIDTH,
            depth=DEPTH,
            num_heads=NUM_HEADS,
            init_values=1.0,
            block_chunks=0,
        ),
        dino_head=heads[0],
        ibot_head=None if case.is_tied else heads[1],
        centering={"softmax_center": "centering"}.get(case.centering, case.centering),
        num_local_crops=NUM_LOCAL,
        koleo_weight=KOLEO_WEIGHT,
        clip_norm=case.clip_norm,
        layerwise_decay=LAYERWISE_LR_DECAY,
        patch_embed_lr_mult=PATCH_EMBED_LR_MULTIPLIER,
    )
    start = to_reference(start_params(case))
    reference.load({name: torch.tensor(np.array(array)) for name, array in start.items()})
    terms = []
    with one_process_group():
        for i in range(NUM_STEPS):
            lr, last_layer_lr, wd, momentum, teacher_temp = map(float, hyperparameters(i))
            terms.append(
                reference.step(
                    ranks_of(make_batch(i), torch.tensor),
                    lr=lr,
                    last_layer_lr=last_layer_lr,
                    wd=wd,
                    momentum=momentum,
                    teacher_temp=teacher_temp,
                )
            )
    torch.set_num_threads(num_threads)
    reference.dino_loss.apply_center_update()
    reference.ibot_loss.apply_center_update()
    return Run(
        terms=terms,
        student={k: v.detach().numpy() for k, v in reference.student.state_dict().items()},
        teacher={k: v.detach().numpy() for k, v in reference.teacher.state_dict().items()},
        centers={
            "dino": reference.dino_loss.center.numpy().ravel(),
            "ibot": reference.ibot_loss.center.numpy().ravel(),
        },
    )


def ranks_of(batch: dict[str, np.ndarray], tensor) -> list[dict]:
    """A batch as the reference's ranks: crop-major rows, channels first, no padding."""
    crops = {
        name: rearrange(
            normalise(batch[name]), "(s q) v h w c -> s (v q) c h w", s=NUM_GROUPS
        ).copy()
        for name in ("global_crops", "local_crops")
    }
    ranks = []
    for s in range(NUM_GROUPS):
        num_masked = batch["masks"][s].sum()
        ranks.append(
            {
                "global_crops": tensor(crops["global_crops"][s]),
                "local_crops": tensor(crops["local_crops"][s]),
                "masks": tensor(batch["masks"][s]),
                "mask_indices": tensor(np.flatnonzero(batch["masks"][s])),
                "mask_weights": tensor(batch["mask_weights"][s, :num_masked]),
            }
        )
    return ranks
