"""What advice depends on: the settings of one run as plain numbers."""

import dataclasses

from dinov2_jax.optim.schedules import scaled_learning_rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """One run. Where not said otherwise, a name and its unit are those of configs/base.py.

    Attributes:
      num_images: of the training data.
      num_batch_pieces: batch shards times micro-batches: each gets whole groups.
      embed_dim: of the backbone, whichever way it is configured.
      num_local_crops: of an image.
      dino_prototypes, ibot_prototypes: of the heads; with a shared head the first serves both.
    """

    num_images: int
    global_batch_size: int
    total_steps: int
    group_size: int
    num_batch_pieces: int
    embed_dim: int
    layer_scale_init: float
    patch_size: int
    global_crop_size_px: int
    local_crop_size_px: int
    num_local_crops: int
    mask_probability: float
    mask_ratio_min: float
    mask_ratio_max: float
    dino_weight: float
    ibot_weight: float
    koleo_weight: float
    has_separate_head: bool
    dino_prototypes: int
    ibot_prototypes: int
    centering: str
    center_momentum: float
    teacher_temp_start: float
    teacher_temp: float
    teacher_temp_warmup_steps: int
    momentum_start: float
    momentum_end: float
    base_learning_rate: float
    min_learning_rate: float
    learning_rate_scaling: str
    layerwise_lr_decay: float
    warmup_steps: int
    freeze_last_layer_steps: int

    @property
    def learning_rate_factor(self) -> float:
        """The peak learning rate over its base."""
        return scaled_learning_rate(
            1.0, global_batch_size=self.global_batch_size, rule=self.learning_rate_scaling
        )

    @property
    def prototypes(self) -> dict[str, int]:
        """K of each head that a loss uses, by its key."""
        sizes = {
            "dino.num_prototypes": self.dino_prototypes,
            "ibot.num_prototypes": self.ibot_prototypes,
        }
        return {key: sizes[key] for key, _ in self.rows}

    @property
    def rows(self) -> dict[tuple[str, str], float]:
        """Teacher rows of a step, over all devices, by the key of the K they meet and their kind.

        Masked patches are an expectation; block masks seldom fall short of it by a few.
        """
        rows = {}
        if self.dino_weight:
            rows["dino.num_prototypes", "CLS tokens"] = 2.0 * self.global_batch_size
        if self.ibot_weight:
            key = "ibot.num_prototypes" if self.has_separate_head else "dino.num_prototypes"
            patches = (self.global_crop_size_px // self.patch_size) ** 2
            ratio = (self.mask_ratio_min + self.mask_ratio_max) / 2
            masked_crops = 2 * self.global_batch_size * self.mask_probability
            rows[key, "masked patches"] = masked_crops * ratio * patches
        return rows
