"""Every configuration key: default, unit, meaning. Recipes are deltas on this file.

The defaults are the reference's "long" ViT-L/14 recipe (paper appendix B, Tables 16-17; reference
`configs/train/vitl14.yaml`). Lengths in steps follow `total_steps` by reference: overriding
`total_steps` alone gives a valid, proportionally shorter run.

Three kinds of keys: *result-changing* (a resumed run must not change them), *speed only* (the
result is the same up to rounding) and *bookkeeping* (what is written, and when).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the base configuration, locked: unknown keys are errors."""
    config = ConfigDict()

    # ---- result-changing ---------------------------------------------------------------------
    config.seed = 0  # of initialisation, data order, augmentation, masks and drop path
    config.total_steps = 625_000  # optimizer steps of the whole run
    config.global_batch_size = 3072  # images a step, over all devices and hosts
    # Images a group: the reference's per-GPU batch. iBOT masks are drawn over the group's
    # 2 * group_size global crops, KoLeo looks for neighbours inside it, and the batch-subset drop
    # path draws inside it. Must divide global_batch_size; the number of groups must be a multiple
    # of the number of batch shards (devices on the mesh axes data and fsdp).
    config.group_size = 32
    total_steps = config.get_ref("total_steps")
    # Micro-batches a step, of whole groups each. Sinkhorn, the centers and the loss means still
    # see the whole batch and KoLeo its groups: the result is that of 1 up to rounding, but for
    # drop path, which draws anew for each micro-batch. Saves the student's activations; the
    # teacher's targets of the whole batch stay, which heads="blocks" keeps as a few numbers a row.
    config.grad_accumulation_steps = 1

    config.data = ConfigDict()
    # A folder (recursive), a .txt list, tar shards ("shards/*.tar"), ArrayRecord files
    # ("x.array_record*"), "hf:name[/config]:split", "tfds:name:split" or "photos:". The first three
    # may be at a URL as well, "gs://bucket/folder": docs/object_stores.md.
    config.data.path = ""
    config.data.mixture = ()  # instead of path: ((path, weight), ...); weights need not sum to 1
    # Share of unreadable images above which the run stops; unless it is 0, one never does.
    config.data.max_bad_fraction = 0.01
    config.data.max_image_pixels = 200_000_000  # a larger image counts as bad
    config.data.in_channels = 3  # 1 decodes to greyscale, 3 to RGB, 4 to RGBA

    config.crops = ConfigDict()
    config.crops.global_crop_size_px = 224
    config.crops.global_crop_scale = (0.32, 1.0)  # share of the image's area
    config.crops.local_crop_size_px = 98
    config.crops.local_crop_scale = (0.05, 0.32)
    config.crops.num_local_crops = 8  # 0 works
    config.crops.aspect_ratio = (3 / 4, 4 / 3)

    config.augment = ConfigDict()
    # "as_released": blur probabilities as the reference executes them (global 0.0 and 0.9, local
    # 0.5), which trained the released weights; "as_intended": those its arguments mean (global
    # 1.0 and 0.1, local 0.5). Either is overridden by blur_probability.
    config.augment.mode = "as_released"
    config.augment.blur_probability = ()  # () by mode, or (global 1, global 2, local)
    config.augment.flip_probability = 0.5  # horizontal
    config.augment.jitter_probability = 0.8
    config.augment.brightness = 0.4  # factor in 1 +- brightness
    config.augment.contrast = 0.4
    config.augment.saturation = 0.2
    config.augment.hue = 0.1  # shift in +- hue, in turns
    config.augment.grayscale_probability = 0.2
    config.augment.blur_kernel_size_px = 9
    config.augment.blur_sigma_px = (0.1, 2.0)
    config.augment.solarize_probability = (0.0, 0.2, 0.0)  # global 1, global 2, local
    config.augment.solarize_threshold = 128  # of 255
    config.augment.mean = (0.485, 0.456, 0.406)  # of pixels in [0, 1], one per channel
    config.augment.std = (0.229, 0.224, 0.225)

    config.model = ConfigDict()
    config.model.variant = "vit_large"  # vit_small, vit_base, vit_large, vit_giant2, or "custom"
    config.model.patch_size = 14
    config.model.embed_dim = 0  # 0: the variant's; likewise depth and num_heads
    config.model.depth = 0
    config.model.num_heads = 0
    config.model.mlp_ratio = 4.0
    config.model.ffn = "swiglu"  # mlp | swiglu
    config.model.num_register_tokens = 0
    config.model.layer_scale_init = 1e-5
    config.model.drop_path_rate = 0.4  # uniform over depth
    config.model.drop_path_mode = "subset"  # subset (the reference's, saves compute) | bernoulli
    # Resizing the position table: "offset" (bicubic, scale offset 0.1: the reference's backbones
    # without registers, and its training) | "antialias" (those with registers) | "plain" (those of
    # transformers without registers: no offset).
    config.model.interpolation = "offset"

    config.masks = ConfigDict()
    config.masks.mask_probability = 0.5  # share of a group's global crops that are masked
    config.masks.mask_ratio_min = 0.1  # share of a masked crop's patches
    config.masks.mask_ratio_max = 0.5

    config.dino = ConfigDict()
    config.dino.loss_weight = 1.0  # 0: iBOT only
    config.dino.num_prototypes = 131_072
    config.dino.bottleneck_dim = 384
    config.dino.hidden_dim = 2048
    config.dino.num_layers = 3

    config.ibot = ConfigDict()
    config.ibot.loss_weight = 1.0  # 0: DINO only (and no masking)
    config.ibot.separate_head = True  # False: the DINO head serves both, the sizes below idle
    config.ibot.num_prototypes = 131_072
    config.ibot.bottleneck_dim = 256
    config.ibot.hidden_dim = 2048
    config.ibot.num_layers = 3

    config.koleo = ConfigDict()
    config.koleo.loss_weight = 0.1  # 0: off
    config.koleo.koleo_crops = "both"  # both (the reference) | first (the paper's text)

    config.centering = ConfigDict()
    config.centering.kind = "sinkhorn_knopp"  # sinkhorn_knopp | softmax_center
    config.centering.num_sinkhorn_iters = 3
    config.centering.center_momentum = 0.9
    config.centering.student_temp = 0.1
    config.centering.teacher_temp_start = 0.04
    config.centering.teacher_temp = 0.07  # after the warm-up
    config.centering.teacher_temp_warmup_steps = total_steps * 37_500 // 625_000

    config.teacher = ConfigDict()
    config.teacher.momentum_start = 0.994  # EMA: teacher <- m * teacher + (1 - m) * student
    config.teacher.momentum_end = 1.0

    config.optim = ConfigDict()
    config.optim.base_learning_rate = 2e-4
    # "sqrt_1024": base * sqrt(global_batch_size / 1024), the reference's; "none": base as it is.
    config.optim.learning_rate_scaling = "sqrt_1024"
    config.optim.min_learning_rate = 1e-6
    config.optim.warmup_steps = total_steps * 100_000 // 625_000
    config.optim.weight_decay_start = 0.04
    config.optim.weight_decay_end = 0.2
    config.optim.adam_b1 = 0.9
    config.optim.adam_b2 = 0.999
    config.optim.adam_eps = 1e-8
    config.optim.clip_norm = 3.0  # L2, of backbone, dino_head and ibot_head each; 0: no clipping
    config.optim.layerwise_lr_decay = 1.0
    config.optim.patch_embed_lr_multiplier = 0.2
    config.optim.freeze_last_layer_steps = total_steps * 1_250 // 625_000

    # Compute type of the network: "auto" (bfloat16 on TPU and GPU, float32 on CPU), "bfloat16" or
    # "float32". Parameters, EMA, optimizer state, normalisations, softmax, logits and losses are
    # float32 whatever is set here.
    config.dtype = "auto"

    # ---- speed only ----------------------------------------------------------------------------
    # auto | none | dots | branches | blocks: what the backward pass recomputes; auto is dots on CPU
    # and branches on TPU, where they are the fastest too, and none elsewhere.
    config.remat = "auto"
    # auto | xla | by_head (one CPU device) | pallas (TPU) | cudnn (GPU, bfloat16); auto is by_head
    # on one or two cores, pallas on TPU, cuDNN on Hopper and later GPUs in bfloat16, XLA elsewhere.
    config.attention = "auto"
    # auto | xla | products (CPU) | pallas (TPU): the blocks' layer normalisation; auto is products
    # on CPU, pallas on TPU, and xla elsewhere.
    config.layer_norm = "auto"
    # auto | plain | flat (tokens of all images as one axis) | transposed (one CPU device: flat, and
    # gradients of kernels wider in than out are made transposed): the blocks' products with
    # weights; auto is transposed on one CPU device, flat on several and plain elsewhere.
    config.product_form = "auto"
    # auto | gather | matmul (with one-hot rows) | pallas (TPU, with layer_norm pallas): how the
    # subset drop path takes images out and puts them back; auto is pallas on TPU (matmul where
    # layer_norm is xla) and gather elsewhere.
    config.drop_path_form = "auto"
    # Prototype losses: dense (logits [rows, k]) | blocks (of prototypes: memory does not grow with
    # k) | pallas (blocks by kernels; TPU) | auto (pallas on TPU, and elsewhere blocks where dense
    # logits take above 2 GiB of a device, or an eighth of the memory of an A100, H100 or H200).
    config.heads = "auto"
    config.head_block_size = 0  # prototypes of a block on one device; 0: by the number of rows
    config.scan_unroll = 1  # blocks unrolled in each turn of the scan over depth
    # auto | "" | cpu_products | tpu_overlap | gpu_overlap: XLA flags, see docs/kernels.md; auto
    # is cpu_products on CPU and none elsewhere.
    config.compiler_preset = "auto"

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices on each axis; one of them may be -1: what is left
    config.mesh.fsdp = 1
    config.mesh.model = 1  # cuts the prototypes only: the backbone is computed on each again
    config.mesh.min_size_to_shard_mb = 4.0  # smaller tensors are replicated over fsdp
    # auto | gather | keep: kernels that fsdp cuts are gathered for the backward pass again, which
    # takes less memory, or whole ones are kept for it, all of the student's backbone on each
    # device (if there are local crops); auto is keep on GPUs and TPUs but for v5e.
    config.mesh.backward_kernels = "auto"

    config.loader = ConfigDict()
    config.loader.num_workers = 0  # processes; 0: threads only. Results do not depend on it
    config.loader.num_threads = 4  # decoding threads in each process
    config.loader.prefetch_batches = 4

    # ---- bookkeeping ---------------------------------------------------------------------------
    config.log_every_steps = 10
    config.checkpoint_every_steps = total_steps * 12_500 // 625_000  # 0: at the end only
    config.eval_every_steps = total_steps * 12_500 // 625_000  # 0: before and at the end only
    config.teacher_every_steps = total_steps * 12_500 // 625_000  # teacher.safetensors; 0: at end
    config.profile_steps = ""  # "10:13" writes a trace of these steps to workdir/profile

    config.checkpoints = ConfigDict()
    config.checkpoints.keep_last = 3
    config.checkpoints.keep_every_steps = 0  # additionally keep these; 0: none
    config.checkpoints.keep_best = True  # the one with the best in-run kNN

    config.eval = ConfigDict()
    config.eval.name = ""  # <set> in the metric names; "": from the query path
    config.eval.kind = "none"  # none | knn (labelled sources) | crop_identity (which photo?)
    config.eval.bank_path = ""  # source with labels (knn) or of the bank's crops (crop_identity)
    config.eval.query_path = ""
    config.eval.num_neighbors = 20
    config.eval.temperature = 0.07
    config.eval.resize_size_px = 256  # short side, then a centred crop of crop_size_px
    config.eval.crop_size_px = 224
    config.eval.batch_size = 64
    config.eval.max_images = 50_000  # of each of bank and queries
    config.eval.crops_per_image = 10  # crop_identity: crops of each photo, bank and queries each

    config.guards = ConfigDict()
    config.guards.max_nonfinite_steps = 10  # in the whole run; one more stops it
    config.guards.collapse_check = True

    config.pictures = True  # crops.png at the start, pca.png at the end
    config.tensorboard = True
    config.wandb_project = ""  # "": off (needs the extra wandb)

    return config.lock()
