"""The paper's numbers for frozen features, to stand beside ours in a table.

Oquab et al., 2023 (arXiv 2304.07193): Tables 4-11 and section 8. Of ViT-S, B, L and g, patch 14,
without registers; differences of 0.6 points are noise there. ViT-g alone has the fairness tables.
"""

from collections.abc import Mapping
from typing import Any

VARIANTS = ("vit_small", "vit_base", "vit_large", "vit_giant2")
# (data set, task, metric): S, B, L, g.
NUMBERS: dict[tuple[str, str, str], tuple[float | None, ...]] = {
    ("imagenet1k", "knn", "top1"): (79.0, 82.1, 83.5, 83.5),
    ("imagenet1k", "linear", "top1"): (81.1, 84.5, 86.3, 86.5),
    ("imagenet_real", "linear", "top1"): (86.6, 88.3, 89.5, 89.6),
    ("imagenet_v2", "linear", "top1"): (70.9, 75.1, 78.0, 78.4),
    ("imagenet_a", "linear", "top1"): (33.5, 55.1, 71.3, 75.9),
    ("imagenet_r", "linear", "top1"): (53.7, 63.3, 74.4, 78.8),
    ("imagenet_c", "linear", "mce"): (54.4, 42.7, 31.5, 28.2),
    ("imagenet_sketch", "linear", "top1"): (41.2, 50.6, 59.3, 62.5),
    ("inat18", "linear", "top1"): (69.0, 76.4, 80.4, 81.6),
    ("inat21", "linear", "top1"): (74.2, 81.1, 85.1, 85.7),
    ("places205", "linear", "top1"): (62.9, 66.2, 67.3, 67.5),
    ("k400", "video", "top1"): (67.8, 73.2, 76.3, 78.4),
    ("ucf101", "video", "top1"): (87.0, 89.1, 90.5, 91.2),
    ("ssv2", "video", "top1"): (33.1, 34.4, 35.6, 38.3),
    ("food101", "logreg", "top1"): (89.1, 92.8, 94.3, 94.7),
    ("cifar10", "logreg", "top1"): (97.7, 98.7, 99.3, 99.5),
    ("cifar100", "logreg", "top1"): (87.5, 91.3, 93.4, 94.4),
    ("sun397", "logreg", "top1"): (74.4, 77.3, 78.7, 78.7),
    ("cars", "logreg", "top1"): (81.6, 88.2, 90.1, 91.4),
    ("dtd", "logreg", "top1"): (80.6, 83.3, 84.0, 84.5),
    ("cub", "logreg", "top1"): (88.1, 89.6, 90.5, 91.6),
    ("aircraft", "logreg", "mean_per_class"): (74.0, 79.4, 81.5, 87.2),
    ("pets", "logreg", "mean_per_class"): (95.1, 96.2, 96.6, 96.7),
    ("caltech101", "logreg", "mean_per_class"): (97.0, 96.1, 97.5, 97.6),
    ("flowers", "logreg", "mean_per_class"): (99.6, 99.6, 99.7, 99.7),
    ("voc07", "logreg", "map_11_point"): (87.8, 88.2, 88.3, 89.0),
    ("ade20k", "segmentation", "miou_linear"): (44.3, 47.3, 47.7, 49.0),
    ("ade20k", "segmentation", "miou_ms"): (47.2, 51.3, 53.1, 53.0),
    ("cityscapes", "segmentation", "miou_linear"): (66.6, 69.4, 70.3, 71.3),
    ("cityscapes", "segmentation", "miou_ms"): (77.1, 80.0, 80.9, 81.0),
    ("voc", "segmentation", "miou_linear"): (81.1, 82.5, 82.1, 83.0),
    ("voc", "segmentation", "miou_ms"): (82.6, 84.9, 86.0, 86.2),
    ("nyu", "depth", "rmse_linear1"): (0.449, 0.399, 0.384, 0.344),
    ("nyu", "depth", "rmse_linear4"): (0.417, 0.362, 0.333, 0.298),
    ("nyu", "depth", "rmse_dpt"): (0.356, 0.317, 0.293, 0.279),
    ("kitti", "depth", "rmse_linear1"): (3.1, 2.9, 2.78, 2.62),
    ("kitti", "depth", "rmse_linear4"): (2.86, 2.59, 2.5, 2.35),
    ("kitti", "depth", "rmse_dpt"): (2.34, 2.23, 2.14, 2.11),
    ("sunrgbd", "depth", "rmse_linear1"): (0.477, 0.448, 0.429, 0.402),
    ("sunrgbd", "depth", "rmse_linear4"): (0.431, 0.4, 0.396, 0.362),
    ("sunrgbd", "depth", "rmse_dpt"): (0.409, 0.377, 0.36, 0.338),
    ("roxford5k", "retrieval", "map_medium"): (68.8, 72.9, 75.1, 73.6),
    ("roxford5k", "retrieval", "map_hard"): (43.2, 49.5, 54.0, 52.3),
    ("rparis6k", "retrieval", "map_medium"): (84.6, 90.3, 92.7, 92.1),
    ("rparis6k", "retrieval", "map_hard"): (68.5, 78.6, 83.5, 82.6),
    ("met", "retrieval", "gap"): (29.4, 36.7, 40.0, 36.8),
    ("met", "retrieval", "gap_minus"): (54.3, 63.5, 68.9, 73.6),
    ("met", "retrieval", "acc"): (57.7, 66.1, 71.6, 76.5),
    ("amstertime", "retrieval", "map"): (43.5, 45.6, 50.0, 46.7),
    ("dollar_street", "fairness", "income_low"): (None, None, None, 67.4),
    ("dollar_street", "fairness", "income_medium"): (None, None, None, 83.3),
    ("dollar_street", "fairness", "income_high"): (None, None, None, 90.5),
    ("dollar_street", "fairness", "region_africa"): (None, None, None, 74.0),
    ("dollar_street", "fairness", "region_asia"): (None, None, None, 81.6),
    ("dollar_street", "fairness", "region_americas"): (None, None, None, 86.2),
    ("dollar_street", "fairness", "region_europe"): (None, None, None, 89.7),
    ("casual_conversations", "fairness", "human_female_darker"): (None, None, None, 97.3),
    ("casual_conversations", "fairness", "human_female_lighter"): (None, None, None, 97.7),
    ("casual_conversations", "fairness", "human_male_darker"): (None, None, None, 86.1),
    ("casual_conversations", "fairness", "human_male_lighter"): (None, None, None, 84.0),
    ("casual_conversations", "fairness", "possibly_human_female_darker"): (None, None, None, 15.8),
    ("casual_conversations", "fairness", "possibly_human_female_lighter"): (None, None, None, 17.2),
    ("casual_conversations", "fairness", "possibly_human_male_darker"): (None, None, None, 52.2),
    ("casual_conversations", "fairness", "possibly_human_male_lighter"): (None, None, None, 48.1),
}


def datasets() -> list[str]:
    """Names of the data sets that the paper has numbers for."""
    return sorted({dataset for dataset, _, _ in NUMBERS})


def paper_number(*, dataset: str, task: str, metric: str, model: Mapping[str, Any]) -> float | None:
    """The paper's number for a variant; None where it has none.

    Args:
      dataset, task, metric: of a result.
      model: of its record: `variant`, `patch_size`, `num_register_tokens`.
    """
    of_paper = model["patch_size"] == 14 and not model["num_register_tokens"]
    if not of_paper or model["variant"] not in VARIANTS:
        return None
    numbers = NUMBERS.get((dataset, task, metric))
    return numbers and numbers[VARIANTS.index(model["variant"])]


def metric_of(*, dataset: str, task: str) -> str | None:
    """The metric that the paper reports for a data set in a task; None where it has none."""
    return next((name for at, of, name in NUMBERS if (at, of) == (dataset, task)), None)
