"""The k-NN task from the command line, against the functions below it."""

import numpy as np
import pytest

from dinov2_jax.evals.__main__ import main
from dinov2_jax.evals.feature_cache import cached_features
from dinov2_jax.evals.knn import few_shot_rows, knn_accuracy
from tests.evals.conftest import read


@pytest.mark.parametrize("seed", [0, 5])
def test_numbers_are_those_of_the_functions(arguments, model, colors, tmp_path, seed):
    flags = f"--neighbors 1 3 --shots 2 3 --tries 4 --split test --seed {seed}".split()
    assert main(["knn", *arguments, *flags]) == 0
    record = read(tmp_path)
    bank, queries = (
        cached_features(model, str(colors / split), tmp_path / "again", quiet=True)
        for split in ("train", "test")
    )
    query = dict(query_features=np.asarray(queries["cls"]), query_labels=queries.labels)
    features, labels = np.asarray(bank["cls"]), bank.labels
    expected = knn_accuracy(
        bank_features=features, bank_labels=labels, num_neighbors=[1, 3], **query
    )
    metrics = record["metrics"]
    assert metrics["top1_k1"] == 100 * expected[1] and metrics["top1_k3"] == 100 * expected[3]
    assert metrics["top1"] == max(metrics["top1_k1"], metrics["top1_k3"])
    assert metrics["top5"] == 100  # of three classes
    for shots, k in ((2, [1, 2]), (3, [1, 3])):
        tries = []
        for number in range(4):
            rows = few_shot_rows(labels, shots=shots, seed=(number, seed))
            found = knn_accuracy(
                bank_features=features[rows], bank_labels=labels[rows], num_neighbors=k, **query
            )
            tries.append([100 * found[i] for i in k])
        means = np.mean(tries, axis=0)
        for i, mean in zip(k, means, strict=True):
            assert metrics[f"top1_k{i}_{shots}_shot"] == pytest.approx(mean)
        assert metrics[f"top1_{shots}_shot"] == pytest.approx(means.max())
    assert "top1_k3_2_shot" not in metrics  # no more voters than shots, as in the reference
    assert record["headline"] == ["top1", "top1_2_shot", "top1_3_shot"]
    assert record["counts"] == {"train": 24, "test": 12, "classes": 3}
    per_class = record["details"]["per_class"]
    assert list(per_class) == ["blue", "green", "red"]
    assert np.mean(list(per_class.values())) == pytest.approx(metrics["top1"])
    wrong = sum(record["details"]["confusions"].values())
    assert wrong == round(12 * (1 - metrics["top1"] / 100))
    assert (tmp_path / "out" / "confusion.png").exists()


def test_more_voters_than_images_are_left_out(arguments, tmp_path, capsys):
    assert main(["knn", *arguments]) == 0
    assert "the bank has 24 images: k is 10, 20" in capsys.readouterr().out
    assert "top1_k100" not in read(tmp_path)["metrics"]


def test_few_shots_are_drawn_without_replacement():
    labels = np.array([0] * 5 + [1] * 2 + [4] * 9)
    rows = few_shot_rows(labels, shots=3, seed=0)
    assert len(set(rows.tolist())) == len(rows)
    np.testing.assert_array_equal(np.bincount(labels[rows]), [3, 2, 0, 0, 3])
    assert (rows != few_shot_rows(labels, shots=3, seed=1)).any()
    np.testing.assert_array_equal(rows, few_shot_rows(labels, shots=3, seed=0))
    # The first tries of seed 0 are what they were before there was one.
    np.testing.assert_array_equal(rows, few_shot_rows(labels, shots=3, seed=(0, 0)))
    assert (rows != few_shot_rows(labels, shots=3, seed=(0, 1))).any()
