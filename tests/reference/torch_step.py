"""One training step of the reference in plain PyTorch float32, on the package's own modules.

`dinov2.train.ssl_meta_arch` wants xFormers and CUDA, so its step is retold here: one backbone call
per crop size, no padding, no mixed precision, no FSDP. Each stage names the lines it follows.
Several ranks (GPUs of the reference, our groups) are computed in one process: sums over ranks run
over concatenated rows, and losses are averaged over ranks as FSDP averages gradients.

A rank is a dict of tensors: global_crops `[2q, c, h, w]` (crop-major), local_crops `[lq, c, h, w]`,
masks bool `[2q, n]`, mask_indices `[m]` into the flattened `[2q n]`, mask_weights `[m]`.
"""

import dataclasses

import torch
from dinov2.layers import DINOHead
from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.param_groups import fuse_params_groups, get_params_groups_with_decay

NUM_GLOBAL_CROPS = 2


@dataclasses.dataclass
class TorchStep:
    """Student, teacher, centers and optimizer of the reference.

    Attributes:
      backbone, dino_head, ibot_head: arguments of the package's modules; ibot_head None ties.
      centering: "sinkhorn_knopp" or "centering", the reference's words.
      num_local_crops: per image.
      koleo_weight: of the total; DINO and iBOT weigh 1.
      clip_norm: of each module.
      layerwise_decay, patch_embed_lr_mult: of the parameter groups.
    """

    backbone: dict
    dino_head: dict
    ibot_head: dict | None
    centering: str
    num_local_crops: int
    koleo_weight: float
    clip_norm: float
    layerwise_decay: float
    patch_embed_lr_mult: float

    def __post_init__(self):
        self.student, self.teacher = self.build(), self.build()
        for parameter in self.teacher.parameters():  # ssl_meta_arch.py 121-123
            parameter.requires_grad = False
        self.dino_loss = DINOLoss(self.dino_head["out_dim"])
        patch_head = self.dino_head if self.ibot_head is None else self.ibot_head
        self.ibot_loss = iBOTPatchLoss(patch_head["out_dim"])
        self.koleo_loss = KoLeoLoss()
        # ssl_meta_arch.py 374-391, train.py 62-63: groups of each module, fused.
        groups = []
        for module in self.student.values():
            rows = get_params_groups_with_decay(
                module,
                lr_decay_rate=self.layerwise_decay,
                patch_embed_lr_mult=self.patch_embed_lr_mult,
            )
            groups += fuse_params_groups(rows)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))

    def build(self) -> torch.nn.ModuleDict:
        """Backbone and heads, ssl_meta_arch.py 43-118."""
        modules = {
            "backbone": DinoVisionTransformer(**self.backbone),
            "dino_head": DINOHead(**self.dino_head),
        }
        if self.ibot_head is not None:
            modules["ibot_head"] = DINOHead(**self.ibot_head)
        return torch.nn.ModuleDict(modules)

    def load(self, state_dict: dict) -> None:
        """The same weights for student and teacher, ssl_meta_arch.py 398-399."""
        self.student.load_state_dict(state_dict)
        self.teacher.load_state_dict(state_dict)

    def step(self, ranks, *, lr, last_layer_lr, wd, momentum, teacher_temp) -> dict[str, float]:
        """One iteration, train.py 234-265. Returns loss terms and gradient norms."""
        self.apply_optim_scheduler(lr, wd, last_layer_lr)
        self.optimizer.zero_grad(set_to_none=True)
        terms = self.forward_backward(ranks, teacher_temp)
        for name, module in self.student.items():  # train.py 257-261
            norm = torch.nn.utils.clip_grad_norm_(module.parameters(), self.clip_norm)
            terms[f"grad_norm/{name}"] = norm
        self.optimizer.step()
        self.update_teacher(momentum)
        return {name: float(value) for name, value in terms.items()}

    def apply_optim_scheduler(self, lr, wd, last_layer_lr) -> None:
        """train.py 114-120."""
        for group in self.optimizer.param_groups:
            rate = last_layer_lr if group["is_last_layer"] else lr
            group["lr"] = rate * group["lr_multiplier"]
            group["weight_decay"] = wd * group["wd_multiplier"]

    @torch.no_grad()
    def update_teacher(self, m: float) -> None:
        """ssl_meta_arch.py 359-368."""
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        for teacher, student in pairs:
            teacher.mul_(m)
            teacher.add_(student, alpha=1 - m)

    def patch_head(self, modules):
        """The head of masked patches, ssl_meta_arch.py 172-197: tied or separate."""
        return modules["dino_head" if self.ibot_head is None else "ibot_head"]

    @torch.no_grad()
    def teacher_targets(self, ranks, teacher_temp):
        """Per rank DINO targets `[2, q, k]`, swapped A for B, and iBOT targets `[m, k]`."""
        cls_rows, patch_rows = [], []
        for rank in ranks:
            # ssl_meta_arch.py 162-168: unmasked crops; the two halves change places.
            out = self.teacher["backbone"](rank["global_crops"], is_training=True)
            first, second = out["x_norm_clstoken"].chunk(NUM_GLOBAL_CROPS)
            cls_rows.append(self.teacher["dino_head"](torch.cat((second, first))))
            # 172-197: the masked tokens through their head (its rows are independent of each
            # other, so the padded buffer and the shared call change nothing).
            tokens = out["x_norm_patchtokens"].flatten(0, 1)[rank["mask_indices"]]
            patch_rows.append(self.patch_head(self.teacher)(tokens))
        all_cls, all_patches = torch.cat(cls_rows), torch.cat(patch_rows)
        if self.centering == "centering":  # 202-213
            cls_probs = self.dino_loss.softmax_center_teacher(all_cls, teacher_temp)
            self.dino_loss.update_center(all_cls)
            patch_probs = self.ibot_loss.softmax_center_teacher(all_patches[None], teacher_temp)[0]
            # Each rank enters its mean over its own rows, ibot_patch_loss.py `update_center`.
            means = torch.stack([rows.mean(0, keepdim=True) for rows in patch_rows])
            self.ibot_loss.update_center(means)
        else:  # 215-225
            cls_probs = self.dino_loss.sinkhorn_knopp_teacher(all_cls, teacher_temp)
            patch_probs = self.ibot_loss.sinkhorn_knopp_teacher(
                all_patches,
                teacher_temp,
                n_masked_patches_tensor=torch.tensor([len(all_patches)]),
            )
        cls_probs = cls_probs.split([len(rows) for rows in cls_rows])
        patch_probs = patch_probs.split([len(rows) for rows in patch_rows])
        return [rows.unflatten(0, (NUM_GLOBAL_CROPS, -1)) for rows in cls_probs], patch_probs

    def forward_backward(self, ranks, teacher_temp) -> dict[str, torch.Tensor]:
        """ssl_meta_arch.py 135-349. Returns the terms as optimised, before their weights."""
        targets = zip(*self.teacher_targets(ranks, teacher_temp), strict=True)
        terms = [
            self.rank_losses(rank, cls_probs, patch_probs)
            for rank, (cls_probs, patch_probs) in zip(ranks, targets, strict=True)
        ]
        mean = {name: sum(term[name] for term in terms) / len(terms) for name in terms[0]}
        total = (
            mean["dino_local_loss"]
            + mean["dino_global_loss"]
            + mean["ibot_loss"]
            + self.koleo_weight * mean["koleo_loss"]
        )
        total.backward()  # 345
        return {name: value.detach() for name, value in {**mean, "total_loss": total}.items()}

    def rank_losses(self, rank, cls_probs, patch_probs) -> dict[str, torch.Tensor]:
        """The student's side on one rank."""
        # 150-151: the divisor of both DINO terms.
        num_terms = max(self.num_local_crops * NUM_GLOBAL_CROPS, 1)
        num_terms += (NUM_GLOBAL_CROPS - 1) * NUM_GLOBAL_CROPS
        # 238-240: global crops masked, local crops not.
        backbone, dino_head = self.student["backbone"], self.student["dino_head"]
        large = backbone(rank["global_crops"], masks=rank["masks"], is_training=True)
        small = backbone(rank["local_crops"], is_training=True)
        # 244-279: through the heads.
        global_cls = large["x_norm_clstoken"]
        global_logits = dino_head(global_cls)
        local_logits = dino_head(small["x_norm_clstoken"])
        tokens = large["x_norm_patchtokens"].flatten(0, 1)[rank["mask_indices"]]
        patch_logits = self.patch_head(self.student)(tokens)

        local_loss = self.dino_loss(local_logits.chunk(self.num_local_crops), cls_probs)  # 281-285
        # 294-307: both global crops at once, against the swapped targets, hence the 2.
        global_loss = self.dino_loss([global_logits], [cls_probs.flatten(0, 1)])
        koleo = sum(self.koleo_loss(crop) for crop in global_cls.chunk(2))  # 316-319
        ibot = self.ibot_loss.forward_masked(  # 325-337; 157: the scale 1/2
            patch_logits,
            patch_probs,
            student_masks_flat=rank["masks"],
            n_masked_patches=len(patch_logits),
            masks_weight=rank["mask_weights"],
        )
        return {
            "dino_local_loss": local_loss / num_terms,
            "dino_global_loss": global_loss * 2 / num_terms,
            "koleo_loss": koleo,
            "ibot_loss": ibot * 2 * (1 / NUM_GLOBAL_CROPS),
        }
