"""The objective: from a batch to views, teacher targets and the student's loss, stage by stage.

Every array keeps the groups on its leading axis: `s` is what the batch is sharded over, and what
gradient accumulation cuts. Behaviour follows dinov2/train/ssl_meta_arch.py; the stages are
separate so that other compositions (a frozen teacher, no masks) can reuse them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
from einops import rearrange

from dinov2_jax.losses import diagnostics
from dinov2_jax.losses.dino import num_loss_terms
from dinov2_jax.losses.head_modes import DenseHeads, HeadMode
from dinov2_jax.losses.koleo import koleo_loss
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
      heads: how logits and targets are computed; the result is the same.
    """

    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    koleo_crops: str = "both"
    centering: str = "sinkhorn_knopp"
    num_sinkhorn_iters: int = 3
    center_momentum: float = 0.9
    student_temp: float = 0.1
    heads: HeadMode = dataclasses.field(default_factory=DenseHeads)


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
    """The teacher's word on a batch, by loss ("dino", "ibot"), as `losses.head_modes` keeps it."""

    rows: dict[str, Any]  # of the rows [s, ...]: [s, g, q] of DINO, [s, m] of iBOT
    shared: dict[str, Any]  # of all rows

    def of(self, loss: str) -> tuple:
        return self.rows[loss], self.shared[loss]


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


def teacher_rows(
    teacher: Params, views: Views, *, network: Network, losses: LossSettings
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Class features [s, g, q, d], and by loss what its targets are made of.

    Logits or head features: of the class tokens [s, g, q, .] and of the masked patches [s, m, .].
    """
    s, g = views.global_crops.shape[:2]
    images = rearrange(views.global_crops, "s g q ... -> (s g q) ...")
    output = network.apply("backbone", teacher, images)
    cls = rearrange(output.cls, "(s g q) d -> s g q d", s=s, g=g)
    rows = {}
    if losses.dino_weight:
        rows["dino"] = losses.heads.rows(network.head("dino", teacher), cls)
    if losses.ibot_weight:
        tokens = gather_masked(output.patches, views.mask_indices)
        rows["ibot"] = losses.heads.rows(network.head("ibot", teacher), tokens)
    return cls, rows


def teacher_targets(
    teacher: Params,
    rows: dict[str, jax.Array],
    centers: dict[str, jax.Array],
    mask_weights: jax.Array,
    *,
    teacher_temp: jax.Array,
    network: Network,
    losses: LossSettings,
) -> tuple[Targets, dict[str, jax.Array], Metrics]:
    """Turns the rows of the whole batch into targets.

    Returns:
      The targets, the next centers, and what is worth watching about the DINO targets.
    """
    target_rows, shared, centers = {}, {}, dict(centers)
    for loss, loss_rows in rows.items():
        is_real = mask_weights > 0 if loss == "ibot" else jnp.ones(loss_rows.shape[:-1], bool)
        with jax.named_scope(losses.centering):
            (target_rows[loss], shared[loss]), centers[loss] = losses.heads.targets(
                network.head(loss, teacher),
                loss_rows,
                is_real=is_real,
                center=centers[loss],
                temp=teacher_temp,
                centering=losses.centering,
                num_sinkhorn_iters=losses.num_sinkhorn_iters,
                center_momentum=losses.center_momentum,
            )
    targets = Targets(target_rows, shared)
    watch = {}
    if "dino" in rows:
        watch = losses.heads.target_metrics(network.head("dino", teacher), targets.of("dino"))
    return targets, centers, watch


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
    terms: Metrics = {}
    watch: Metrics = {}
    total = 0.0

    if losses.dino_weight:
        num_terms = num_loss_terms(num_global_crops=g, num_local_crops=num_local)
        head = network.head("dino", student)
        loss, parts = losses.heads.dino_loss(
            head,
            cls,
            targets.of("dino"),
            num_global_crops=g,
            num_terms=num_terms,
            student_temp=losses.student_temp,
        )
        total += losses.dino_weight * loss
        watch["student_entropy"] = parts.pop("student_entropy")
        terms |= parts
        watch["dino_ce_over_log_k"] = diagnostics.dino_ce_over_log_k(
            terms["dino_local_loss"],
            terms["dino_global_loss"],
            num_local_crops=num_local,
            num_terms=num_terms,
            num_prototypes=head.num_prototypes,
        )

    if losses.ibot_weight:
        head = network.head("ibot", student)
        terms["ibot_loss"] = losses.heads.ibot_loss(
            head,
            gather_masked(patches, views.mask_indices),
            targets.of("ibot"),
            views.mask_weights,
            num_crops=s * g * q,
            student_temp=losses.student_temp,
        )
        total += losses.ibot_weight * terms["ibot_loss"]
        watch["ibot_ce_over_log_k"] = diagnostics.ibot_ce_over_log_k(
            terms["ibot_loss"],
            views.mask_weights,
            num_crops=s * g * q,
            num_prototypes=head.num_prototypes,
        )

    if losses.koleo_weight:
        crops = cls[:, : g if losses.koleo_crops == "both" else 1]
        terms["koleo_loss"] = koleo_loss(rearrange(crops, "s g q d -> g s q d"))
        total += losses.koleo_weight * terms["koleo_loss"]

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
