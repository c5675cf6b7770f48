"""kNN of labelled images among each other, each left out of its own vote: less noise than a small
validation set's. The trainer saw the images, never their labels.

    python -m benchmarks.leave_one_out WORKDIR .. --data train.tar

At the size of the run's own evaluation. Prints one line a run and writes
WORKDIR/evals/leave_one_out/result.json, which `benchmarks/ablations.py table` shows.
"""

import argparse
import functools
import json
import pathlib

import numpy as np

import dinov2_jax
from dinov2_jax.data.sources import open_source
from dinov2_jax.evals.image_sets import LabelledImages
from dinov2_jax.evals.knn import knn_ranking
from dinov2_jax.features.extractor import FeatureExtractor, cls_and_mean_patch
from dinov2_jax.neighbors import nearest_neighbors

NUM_NEIGHBORS = 20


def accuracy(features: np.ndarray, labels: np.ndarray) -> float:
    """In percent, of features [n, d] with labels [n]."""
    ranked = knn_ranking(
        bank_features=features,
        bank_labels=labels,
        query_features=features,
        num_neighbors=[NUM_NEIGHBORS],
        num_ranks=1,
        search=others,
    )
    return 100 * float(np.mean(ranked[NUM_NEIGHBORS][:, 0] == labels))


def others(queries: np.ndarray, bank: np.ndarray, *, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest that are not the query itself, where both are the same images."""
    similarities, rows = nearest_neighbors(queries, bank, k=k + 1)
    itself = rows == np.arange(len(rows))[:, None]
    # Where more than k copies of an image are nearer, the last of them gives way.
    itself[~itself.any(axis=1), -1] = True
    shape = len(rows), k
    return similarities[~itself].reshape(shape), rows[~itself].reshape(shape)


@functools.cache
def labelled(path: str, resize_size_px: int, crop_size_px: int) -> LabelledImages:
    """Images of a source, prepared as the run's evaluation prepares them; decoded once."""
    source = open_source(path)
    return LabelledImages(
        source,
        label_names=tuple(source.label_names),
        resize_size_px=resize_size_px,
        crop_size_px=crop_size_px,
        num_channels=3,
        max_images=len(source),
        max_image_pixels=200_000_000,
        num_threads=2,
        max_cached_mb=4096,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    parser.add_argument("--data", required=True, help="labelled source")
    options = parser.parse_args()
    for workdir in options.workdirs:
        settings = json.loads((workdir / "config.json").read_text())["eval"]
        images = labelled(options.data, settings["resize_size_px"], settings["crop_size_px"])
        labels = np.array([label for _, label in images])
        model = dinov2_jax.load(str(workdir))
        extract = FeatureExtractor(
            cls_and_mean_patch(model.apply), mean=model.spec.mean, std=model.spec.std
        )
        features = extract(model.params, (image for image, _ in images))
        metrics = {f"leave_one_out_{kind}": accuracy(x, labels) for kind, x in features.items()}
        print(workdir, {name: round(x, 1) for name, x in metrics.items()}, flush=True)
        result = workdir / "evals" / "leave_one_out" / "result.json"
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps({"metrics": metrics}))


if __name__ == "__main__":
    main()
