"""The paper's evaluations of frozen features (Oquab et al., 2023, Tables 4-11).

    python -m dinov2_jax.evals suite --config=configs/evals/paper.py \
        --model=dinov2_vits14 --data=DATASETS --out=results/vits14

Each entry's `data` is a folder in DATASETS; TASK --help says what it must hold. `--only REGEX`
runs some; entries whose data are missing are named and left out.
"""

_FURTHER = {
    "imagenet_real": "{data}/imagenet_real.json:label_sets",
    "imagenet_v2": "{data}/imagenet_v2",
    "imagenet_a": "{data}/imagenet_a",
    "imagenet_r": "{data}/imagenet_r",
    "imagenet_c": "{data}/imagenet_c:corruptions",
    "imagenet_sketch": "{data}/imagenet_sketch",
}
_LINEAR = ("inat18", "inat21", "places205")
_FINE_GRAINED = (
    "food101 cifar10 cifar100 sun397 cars aircraft voc07 dtd pets caltech101 flowers cub"
).split()


def get_config():
    """Entries by name."""
    entries = {
        "imagenet1k_knn": {"task": "knn", "data": "imagenet1k"},
        "imagenet1k_linear": {
            "task": "linear",
            "data": "imagenet1k",
            "augment": True,
            "test": _FURTHER,
        },
    }
    for name in _LINEAR:
        entries[f"{name}_linear"] = {"task": "linear", "data": name, "augment": True}
    for name in _FINE_GRAINED:
        entries[f"{name}_logreg"] = {"task": "logreg", "data": name, "resize": 224, "crop": 224}
    for name in ("ade20k", "cityscapes", "voc"):
        for protocol in ("linear", "ms"):
            key = f"{name}_{protocol}"
            entries[key] = {"task": "segmentation", "data": name, "protocol": protocol}
    for protocol in ("linear1", "linear4", "dpt"):
        for name in ("nyu", "kitti"):
            entries[f"{name}_{protocol}"] = {"task": "depth", "data": name, "protocol": protocol}
        # Trained on NYU, tested as it is.
        head = f"{{out}}/nyu_{protocol}/head.safetensors"
        entries[f"sunrgbd_{protocol}"] = {"task": "depth", "data": "sunrgbd", "head": head}
    for name in ("roxford5k", "rparis6k", "met", "amstertime"):
        entries[name] = {"task": "retrieval", "data": name}
    for name in ("k400", "ucf101", "ssv2"):
        entries[name] = {"task": "video", "data": name}
    entries["davis"] = {"task": "propagation", "data": "davis"}
    for name in ("dollar_street", "casual_conversations"):
        train = f"{{data}}/{name}_train"
        entries[name] = {"task": "fairness", "data": name, "train": train}
    return entries
