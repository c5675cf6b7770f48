"""What `benchmarks.ablations` changes in configs/small.py, one thing at a time."""

PLAIN = "plain"


def heads(**values) -> dict:
    """Keys of both heads."""
    return {f"{head}.{key}": value for head in ("dino", "ibot") for key, value in values.items()}


def batch(size: int) -> dict:
    """Images a step, in one group."""
    return {"global_batch_size": size, "group_size": size}


def teacher_temp(start: float, end: float) -> dict:
    """At the start and after the warm-up."""
    return {"centering.teacher_temp_start": start, "centering.teacher_temp": end}


def momentum(start: float, end: float) -> dict:
    """Of the teacher, at the start and at the end."""
    return {"teacher.momentum_start": start, "teacher.momentum_end": end}


def learning_rate(value: float) -> dict:
    """From the end of its warm-up to the end of the run."""
    return {"optim.base_learning_rate": value, "optim.min_learning_rate": value}


SOFTMAX_CENTER = {"centering.kind": "softmax_center"}


# What a change is called: the keys it sets, beside the recipe's.
CHANGES = {
    PLAIN: {},
    "prototypes-64": heads(num_prototypes=64),
    "prototypes-1024": heads(num_prototypes=1024),
    "prototypes-4096": heads(num_prototypes=4096),
    "batch-32": batch(32),
    "batch-128": batch(128),
    "softmax-centering": SOFTMAX_CENTER,
    "softmax-centering-0.04": SOFTMAX_CENTER | teacher_temp(0.04, 0.04),
    "teacher-temp-0.01": teacher_temp(0.01, 0.01),
    "teacher-temp-0.04": teacher_temp(0.04, 0.04),
    "teacher-temp-0.04-to-0.07": teacher_temp(0.04, 0.07),
    "momentum-0.9": momentum(0.9, 0.95),
    "momentum-0.99": momentum(0.99, 0.995),
    "papers-schedules": momentum(0.96, 1.0) | {"optim.min_learning_rate": 1e-6},
    "learning-rate-5e-4": learning_rate(5e-4),
    "learning-rate-3e-3": learning_rate(3e-3),
    "layer-scale-1e-5": {"model.layer_scale_init": 1e-5},
    "layer-scale-1": {"model.layer_scale_init": 1.0},
    "papers-crops": {
        "crops.global_crop_scale": (0.32, 1.0),
        "crops.local_crop_scale": (0.05, 0.32),
    },
    "crops-64-and-32-px": {"crops.global_crop_size_px": 64, "crops.local_crop_size_px": 32},
    "local-crops-0": {"crops.num_local_crops": 0},
    "local-crops-8": {"crops.num_local_crops": 8},
    "papers-colors": {
        "augment.brightness": 0.4,
        "augment.contrast": 0.4,
        "augment.saturation": 0.2,
        "augment.hue": 0.1,
        "augment.grayscale_probability": 0.2,
    },
    "no-ibot": {"ibot.loss_weight": 0.0},
    "tied-heads": {"ibot.separate_head": False},
    "no-koleo": {"koleo.loss_weight": 0.0},
    "koleo-0.5": {"koleo.loss_weight": 0.5},
    "drop-path-0.1": {"model.drop_path_rate": 0.1},
    "head-width-2048": heads(hidden_dim=2048),
    # Sick on purpose.
    "sick-learning-rate": learning_rate(0.03),
    "sick-frozen-teacher": momentum(1.0, 1.0),
    "sick-collapse": SOFTMAX_CENTER
    | {
        "centering.center_momentum": 1.0,
        "koleo.loss_weight": 0.0,
        "ibot.loss_weight": 0.0,
    },
}
