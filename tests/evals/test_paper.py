"""The paper's numbers, and for whom they hold."""

import pytest

from dinov2_jax.evals import paper
from dinov2_jax.evals.fairness import ASSOCIATIONS
from dinov2_jax.evals.paper import datasets, metric_of, paper_number

MODEL = {"variant": "vit_small", "patch_size": 14, "num_register_tokens": 0}


def number(dataset="imagenet1k", task="knn", metric="top1", **model):
    return paper_number(dataset=dataset, task=task, metric=metric, model=MODEL | model)


def test_numbers_by_variant():
    assert number() == 79.0
    assert number(variant="vit_giant2") == 83.5
    assert number(dataset="imagenet_c", task="linear", metric="mce", variant="vit_large") == 31.5
    assert number(dataset="dollar_street", task="fairness", metric="income_low") is None


@pytest.mark.parametrize(
    "model", [{"patch_size": 16}, {"num_register_tokens": 4}, {"variant": "custom"}]
)
def test_other_models_have_none(model):
    assert number(**model) is None
    assert number(dataset="mine") is None and number(metric="top5") is None


def test_fairness_is_named_as_its_task_does():
    """Numbers stand beside metrics of these names, which groups and associations make."""
    people = dict(dataset="casual_conversations", task="fairness", variant="vit_giant2")
    assert number(metric="human_female_darker", **people) == 97.3
    assert number(metric="possibly_human_male_lighter", **people) == 48.1
    groups = [f"{x}_{y}" for x in ("female", "male") for y in ("darker", "lighter")]
    assert {metric for name, _, metric in paper.NUMBERS if name == "casual_conversations"} == {
        f"{association}_{group}" for association in ASSOCIATIONS[:2] for group in groups
    }


def test_metrics_and_names():
    assert metric_of(dataset="pets", task="logreg") == "mean_per_class"
    assert metric_of(dataset="food101", task="logreg") == "top1"
    assert metric_of(dataset="food101", task="knn") is None
    assert "voc07" in datasets() and len(set(datasets())) == len(datasets())


def test_every_row_has_the_four_variants_and_the_average_is_the_papers():
    assert all(len(row) == len(paper.VARIANTS) for row in paper.NUMBERS.values())
    # Table 8 prints the mean of the twelve sets: 87.7, 90.1, 91.2, 92.1.
    rows = [row for (_, task, _), row in paper.NUMBERS.items() if task == "logreg"]
    means = [sum(column) / len(column) for column in zip(*rows, strict=True)]
    assert len(rows) == 12 and means == pytest.approx([87.7, 90.1, 91.2, 92.1], abs=0.06)
