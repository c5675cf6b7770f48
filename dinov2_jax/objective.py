"""The objective: from a batch to views, teacher targets and the student's loss, stage by stage.

Every array keeps the groups on its leading axis: `s` is what the batch is sharded over, and what
gradient accumulation cuts. Behaviour follows dinov2/train/ssl_meta_arch.py; the stages are
separate so that other compositions (a frozen teacher, no masks) can reuse them.
"""

import dataclasses
from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
from einops import rearrange

from dinov2_jax.losses import centering, diagnostics
from dinov2_jax.losses.dino import dino_global_loss, dino_local_loss, num_loss_terms
from dinov2_jax.losses.ibot import ibot_loss
from dinov2_jax.losses.koleo import koleo_loss
from dinov2_jax.sharding import shard_rows
from dinov2_jax.train_state import Network, Params

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Weights and constants of the losses; the defaults are the reference's.

    Attributes:
      dino_weight, ibot_weight, koleo_weight: of the three losses; 0 leaves a loss out.
      koleo_crops: "both" global crops, or only the "first".
      centering: "sinkhorn_knopp" or "softmax_center".
      num_sinkhorn_iters: of Sinkhorn-Knopp.
      center_momentum: EMA momentum of the softmax centers.
      student_temp: temperature of the student's softmax.
    """

    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    koleo_crops: str = "both"
    centering: str = "sinkhorn_knopp"
    num_sinkhorn_iters: int = 3
    center_momentum: float = 0.9
    student_temp: float = 0.1


@flax.struct.dataclass
class Views:
    """What the networks see: normalised crops, and which patches are hidden from the student."""

    global_crops: jax.Array  # [s, g, q, height, width, c]
    local_crops: jax.Array  # [s, l, q, height, width, c]
    masks: jax.Array  # bool [s, g * q, n]
    mask_indices: jax.Array  # int32 [s, m], tokens of the group's (g q n)
    mask_weights: jax.Array  # [s, m], 0 = padding


@flax.struct.dataclass
class Targets:
    """The teacher's word on a batch; rows sum to 1, and padding rows count for nothing."""

    dino_probs: jax.Array | None  # [s, g, q, k]
    ibot_probs: jax.Array | None  # [s, m, k]


def make_views(
    batch: dict[str, jax.Array], *, augment: Callable[[jax.Array, jax.Array], jax.Array]
) -> Views:
    """Augments and normalises the crops of a batch and brings the groups to the front.

    Args:
      batch: device fields of `dinov2_jax.data.batch.Batch`.
      augment: (uint8 [n, height, width, c], parameters [n, p]) -> normalised [n, height, width, c].
    """
    num_groups = batch["masks"].shape[0]

    def views_of(crops: jax.Array, parameters: jax.Array) -> jax.Array:
        v, q = crops.shape[1], crops.shape[0] // num_groups
        if v == 0:
            return jnp.zeros((num_groups, 0, q, *crops.shape[2:]), jnp.float32)
        crops = rearrange(crops, "(s q) v ... -> (s v q) ...", s=num_groups)
        parameters = rearrange(parameters, "(s q) v p -> (s v q) p", s=num_groups)
        out = augment(crops, parameters)
        return rearrange(out, "(s v q) ... -> s v q ...", s=num_groups, v=v)

    return Views(
        global_crops=views_of(batch["global_crops"], batch["global_augment"]),
        local_crops=views_of(batch["local_crops"], batch["local_augment"]),
        masks=batch["masks"],
        mask_indices=batch["mask_indices"],
        mask_weights=batch["mask_weights"],
    )


def gather_masked(patches: jax.Array, indices: jax.Array) -> jax.Array:
    """Picks the masked tokens of each group: [(s g q), n, d], [s, m] -> [s, m, d]."""
    tokens = rearrange(patches, "(s gq) n d -> s (gq n) d", s=indices.shape[0])
    return jnp.take_along_axis(tokens, indices[:, :, None], axis=1)


def teacher_logits(
    teacher: Params, views: Views, *, network: Network, losses: LossSettings
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Class features [s, g, q, d], DINO logits [s, g, q, k] and iBOT logits [s, m, k]."""
    s, g = views.global_crops.shape[:2]
    images = rearrange(views.global_crops, "s g q ... -> (s g q) ...")
    output = network.apply("backbone", teacher, images)
    cls = rearrange(output.cls, "(s g q) d -> s g q d", s=s, g=g)
    dino = network.apply("dino_head", teacher, cls) if losses.dino_weight else None
    ibot = None
    if losses.ibot_weight:
        tokens = gather_masked(output.patches, views.mask_indices)
        ibot = network.apply(network.patch_head_name, teacher, tokens)
    return cls, dino, ibot


def center_targets(
    dino_logits: jax.Array | None,
    ibot_logits: jax.Array | None,
    centers: dict[str, jax.Array],
    mask_weights: jax.Array,
    *,
    teacher_temp: jax.Array,
    losses: LossSettings,
) -> tuple[Targets, dict[str, jax.Array]]:
    """Turns teacher logits into targets over the whole batch; also returns the next centers."""
    centers = dict(centers)

    def targets_of(name: str, logits: jax.Array | None, is_real: jax.Array) -> jax.Array | None:
        if logits is None:
            return None
        rows = shard_rows(logits.reshape(-1, logits.shape[-1]), last="model")
        if losses.centering == "sinkhorn_knopp":
            probs = centering.sinkhorn_knopp(
                rows,
                teacher_temp,
                row_weights=is_real.reshape(-1),
                num_iters=losses.num_sinkhorn_iters,
            )
        else:
            probs = centering.softmax_center(rows, centers[name], teacher_temp)
            # The reference averages over the rows of a GPU, then over GPUs: a mean of group means.
            group_rows = jnp.maximum(is_real.sum(axis=1, keepdims=True), 1.0)
            centers[name] = centering.update_center(
                centers[name],
                rows,
                row_weights=(is_real / group_rows).reshape(-1),
                momentum=losses.center_momentum,
            )
        return probs.reshape(logits.shape)

    num_groups = mask_weights.shape[0]
    cls_rows = 0 if dino_logits is None else dino_logits.shape[1] * dino_logits.shape[2]
    targets = Targets(
        dino_probs=targets_of("dino", dino_logits, jnp.ones((num_groups, cls_rows))),
        ibot_probs=targets_of("ibot", ibot_logits, (mask_weights > 0).astype(jnp.float32)),
    )
    return targets, centers


def student_loss(
    student: Params,
    views: Views,
    targets: Targets,
    key: jax.Array,
    *,
    network: Network,
    losses: LossSettings,
) -> tuple[jax.Array, Metrics]:
    """The objective of one (micro-)batch: weighted DINO + iBOT + KoLeo.

    Returns:
      The total loss [], and with it the unweighted terms and what is worth watching about them.
    """
    s, g, q = views.global_crops.shape[:3]
    num_local = views.local_crops.shape[1]
    cls, patches = student_features(
        student, views, key, network=network, has_masks=bool(losses.ibot_weight)
    )
    temp = losses.student_temp
    terms: Metrics = {}
    watch: Metrics = {}

    if losses.dino_weight:
        num_terms = num_loss_terms(num_global_crops=g, num_local_crops=num_local)
        logits = network.apply("dino_head", student, cls)  # [s, g + l, q, k]
        logits, local_logits = logits[:, :g], logits[:, g:]
        terms["dino_global_loss"] = dino_global_loss(
            logits, targets.dino_probs, student_temp=temp, num_terms=num_terms
        )
        terms["dino_local_loss"] = dino_local_loss(
            local_logits, targets.dino_probs, student_temp=temp, num_terms=num_terms
        )
        watch["dino_ce_over_log_k"] = diagnostics.dino_ce_over_log_k(
            terms["dino_local_loss"],
            terms["dino_global_loss"],
            num_local_crops=num_local,
            num_terms=num_terms,
            num_prototypes=logits.shape[-1],
        )
        watch["student_entropy"] = diagnostics.student_entropy(
            rearrange(logits, "s g q k -> (s g q) k"), student_temp=temp
        )

    if losses.ibot_weight:
        tokens = gather_masked(patches, views.mask_indices)
        logits = network.apply(network.patch_head_name, student, tokens)  # [s, m, k]
        terms["ibot_loss"] = ibot_loss(
            logits,
            targets.ibot_probs,
            views.mask_weights,
            student_temp=temp,
            num_crops=s * g * q,
        )
        watch["ibot_ce_over_log_k"] = diagnostics.ibot_ce_over_log_k(
            terms["ibot_loss"],
            views.mask_weights,
            num_crops=s * g * q,
            num_prototypes=logits.shape[-1],
        )

    if losses.koleo_weight:
        crops = cls[:, : g if losses.koleo_crops == "both" else 1]
        terms["koleo_loss"] = koleo_loss(rearrange(crops, "s g q d -> g s q d"))

    weights = {
        "dino_global_loss": losses.dino_weight,
        "dino_local_loss": losses.dino_weight,
        "ibot_loss": losses.ibot_weight,
        "koleo_loss": losses.koleo_weight,
    }
    total = sum(weights[name] * value for name, value in terms.items())
    return total, {"total_loss": total, **terms, **watch}


def student_features(
    student: Params, views: Views, key: jax.Array, *, network: Network, has_masks: bool
) -> tuple[jax.Array, jax.Array]:
    """Runs the student's backbone once over both crop sizes.

    Returns:
      CLS features of the global, then the local crops [s, g + l, q, d], and patch features of the
      global crops [(s g q), n, d].
    """
    s, _, q = views.global_crops.shape[:3]
    num_local = views.local_crops.shape[1]
    images = (rearrange(views.global_crops, "s g q ... -> (s g q) ..."),)
    masks = (rearrange(views.masks, "s gq n -> (s gq) n") if has_masks else None,)
    if num_local:
        images += (rearrange(views.local_crops, "s l q ... -> (s l q) ..."),)
        masks += (None,)
    outputs = network.apply(
        "backbone", student, images, masks, train=True, num_groups=s, rngs={"drop_path": key}
    )
    cls = [rearrange(output.cls, "(s v q) d -> s v q d", s=s, q=q) for output in outputs]
    return jnp.concatenate(cls, axis=1), outputs[0].patches
