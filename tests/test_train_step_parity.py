"""The whole step is the reference's: loss terms, and displacements after five optimizer steps.

Equal weights, crops and masks, two groups (GPUs of the reference), no drop path, LayerScale 1, all
parameters away from their initial zeros and ones. Displacements, not weights, are compared: after
a few steps any two programs agree on the weights. The same comparison must refuse planted mutants.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from einops import rearrange

from dinov2_jax import train_step
from dinov2_jax.convert.state_dict import to_reference
from dinov2_jax.data.batch import AUGMENT_COLUMNS
from dinov2_jax.models.heads import DINOHead
from dinov2_jax.models.vit import VisionTransformer
from dinov2_jax.objective import LossSettings
from dinov2_jax.optim import optimizer as optim
from dinov2_jax.optim.param_groups import ParamGroups, parameter_groups
from dinov2_jax.optim.schedules import Hyperparameters
from dinov2_jax.train_state import Network, TrainState
from tests.parity import require
from tests.reference.process_group import one_process_group

PATCH, GLOBAL_PX, LOCAL_PX, NUM_LOCAL = 14, 56, 28, 2
NUM_GROUPS, GROUP_SIZE, NUM_STEPS = 2, 4, 5
WIDTH, DEPTH, NUM_HEADS = 48, 3, 3
DINO_HEAD = dict(num_prototypes=64, hidden_dim=48, bottleneck_dim=24)
IBOT_HEAD = dict(num_prototypes=56, hidden_dim=48, bottleneck_dim=16)
KOLEO_WEIGHT, LAYERWISE_LR_DECAY, PATCH_EMBED_LR_MULTIPLIER = 0.1, 0.9, 0.2
FROZEN_STEPS = 2

# Float32 on both sides, sums of some hundred terms. Weights drift apart by some 1e-4 of their
# displacement: that is not seen in the losses of later steps, but in the gradients of the last.
LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 1e-4
# Adam makes full steps out of gradients near zero, whose sign is rounding: 1.4e-4 was measured,
# and at least 0.1 for each mutant.
DISPLACEMENT_TOLERANCE = 1e-3


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


def compile_step(case: Case):
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
            losses=LossSettings(centering=case.centering, koleo_weight=KOLEO_WEIGHT),
            augment=normalise,
            seed=0,
        )
        return one_step(state, batch, hyper)

    return jax.jit(step)


@functools.cache
def plain_step(case: Case):
    """The step without mistakes, compiled once."""
    return compile_step(case)


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
        nonfinite_steps=jnp.zeros((), jnp.int32),
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
def plain_run(case: Case) -> Run:
    return run_ours(case)


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


def displacements(case: Case, run: Run) -> dict[str, np.ndarray]:
    """{network and name: movement since the start}, without what has no gradient.

    Adding a vector to all keys shifts each row of attention logits by a constant: the key third of
    qkv.bias has no gradient but rounding, which Adam scales up to full steps. Nothing else is
    exempt.
    """
    start = to_reference(start_params(case))
    moved = {}
    for which in ("student", "teacher"):
        weights = getattr(run, which)
        assert set(weights) == set(start)
        for name, array in weights.items():
            change = np.float64(array) - start[name]
            if name.endswith("attn.qkv.bias"):
                change = np.delete(change, np.s_[WIDTH : 2 * WIDTH])
            moved[f"{which} {name}"] = change
    return moved


def assert_same_displacements(case: Case, ours: Run, reference: Run) -> None:
    """||ours - reference|| <= 1e-3 ||reference||, per tensor, student and teacher."""
    got, want = displacements(case, ours), displacements(case, reference)
    errors = {
        name: np.linalg.norm(got[name] - want[name]) / np.linalg.norm(want[name]) for name in want
    }
    wrong = {name: error for name, error in errors.items() if not error <= DISPLACEMENT_TOLERANCE}
    assert not wrong, f"displacements differ: {wrong}"


pytestmark = [
    pytest.mark.parity,
    # Deprecations inside the reference: its weight_norm and its autocast.
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*autocast.*:FutureWarning"),
]
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@all_cases
def test_loss_terms_and_gradient_norms(case):
    ours, reference = plain_run(case), run_reference(case)
    for got, want in zip(ours.terms, reference.terms, strict=True):
        for name, value in want.items():
            tolerance = NORM_TOLERANCE if name.startswith("grad_norm") else LOSS_TOLERANCE
            np.testing.assert_allclose(got[name], value, rtol=tolerance, err_msg=name)


@all_cases
def test_displacements(case):
    assert_same_displacements(case, plain_run(case), run_reference(case))


@all_cases
def test_centers(case):
    ours, reference = plain_run(case), run_reference(case)
    for name, center in reference.centers.items():
        assert (np.abs(center).max() > 0) == (case.centering == "softmax_center")
        np.testing.assert_allclose(ours.centers[name], center, rtol=1e-4, atol=1e-6)


@all_cases
def test_clipping_bites_in_some_steps(case):
    norms = np.array([step["grad_norm/backbone"] for step in run_reference(case).terms])
    assert (norms > 1.1 * case.clip_norm).any() and (norms < 0.9 * case.clip_norm).any()


def clip_globally(grads, clip_norm):
    norm = optax.tree.norm(grads)
    return jax.tree.map(lambda grad: grad * jnp.minimum(clip_norm / (norm + 1e-6), 1), grads)


def change_leaves(field: str, change):
    """A change of one tree of the parameter groups: `change(path, value)`."""
    return lambda groups: groups._replace(
        **{
            field: jax.tree_util.tree_map_with_path(
                lambda path, value: change(jax.tree_util.keystr(path), value),
                getattr(groups, field),
            )
        }
    )


MUTANTS = {
    "no weight decay": dict(
        change_hyper=lambda hyper: hyper._replace(weight_decay=np.float32(0)),
    ),
    "unfrozen last layer": dict(
        change_hyper=lambda hyper: hyper._replace(last_layer_learning_rate=hyper.learning_rate),
    ),
    "frozen teacher": dict(
        change_hyper=lambda hyper: hyper._replace(teacher_momentum=np.float32(1)),
    ),
    "biases decay": dict(
        change_groups=change_leaves(
            "wd_multiplier", lambda path, value: 1.0 if "bias" in path else value
        ),
    ),
    "tokens do not decay": dict(
        change_groups=change_leaves(
            "wd_multiplier", lambda path, value: 0.0 if "token" in path else value
        ),
    ),
    "patch embedding at full rate": dict(
        change_groups=change_leaves(
            "lr_multiplier", lambda path, value: value * (5 if "patch_embed" in path else 1)
        ),
    ),
    "blocks one layer further down": dict(
        change_groups=change_leaves(
            "lr_multiplier", lambda path, value: value * (0.9 if "blocks" in path else 1)
        ),
    ),
}


def assert_refused(case: Case, ours: Run) -> None:
    with pytest.raises(AssertionError, match="displacements differ"):
        assert_same_displacements(case, ours, run_reference(case))


@all_cases
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_refused(case, mutant):
    assert_refused(case, run_ours(case, **mutant))


def test_global_clipping_is_refused(monkeypatch):
    case = CASES["softmax, tied"]  # the smaller program
    monkeypatch.setattr(optim, "clip_by_module", clip_globally)
    assert_refused(case, run_ours(case, step=compile_step(case)))
