"""kNN during training: how good the teacher's features are by now, beside honest baselines.

Two kinds, built once and called with the teacher's backbone parameters: `labelled_knn` on two
labelled sources, and `crop_identity` ("from which photo is this crop?"), which needs no labels.
Accuracies are named `knn/<name>/<features>`. Nothing here is random: every call sees the same
images.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dinov2_jax.data.records import Source
from dinov2_jax.evals.baselines import baseline_features
from dinov2_jax.evals.image_sets import UNREADABLE, ImageSet, LabelledImages, identity_crops
from dinov2_jax.evals.knn import knn_accuracy
from dinov2_jax.features.extractor import Arrays, FeatureExtractor, cls_and_mean_patch
from dinov2_jax.models.vit import BackboneOutput


class InRunEvaluation:
    """Weighted kNN of one set of queries against one bank.

    Attributes:
      name: <name> in the metrics.
      bank, queries: what is compared; `len` of them counts the images.
    """

    def __init__(
        self,
        *,
        name: str,
        bank: ImageSet,
        queries: ImageSet,
        extractor: FeatureExtractor,
        num_neighbors: int,
        temperature: float,
    ):
        """Binds the sets. Most callers want `labelled_knn` or `crop_identity`.

        Raises:
          ValueError: the bank is smaller than `num_neighbors`, or a set is empty.
        """
        if not 1 <= num_neighbors <= len(bank):
            raise ValueError(
                f"{num_neighbors=} must be between 1 and the bank's {len(bank)} images; "
                "set eval.num_neighbors"
            )
        if not len(queries):
            raise ValueError("the queries must hold at least one image; check eval.query_path")
        self.name, self.bank, self.queries = name, bank, queries
        self._extractor = extractor
        self._vote = {"num_neighbors": [num_neighbors], "temperature": temperature}

    def describe(self) -> str:
        """One line: what is asked against what, and how much of a difference is chance."""
        error = 50 / np.sqrt(len(self.queries))  # in points, of an accuracy of one half
        return (
            f"knn/{self.name}: {len(self.queries)} queries ({self.queries.what}) against "
            f"{len(self.bank)} ({self.bank.what}), k = {self._vote['num_neighbors'][0]}; "
            f"standard error at most {error:.1f} points"
        )

    @property
    def num_bad(self) -> int:
        """Images left out because they cannot be read, as far as they have been tried."""
        return len(self.bank.bad) + len(self.queries.bad)

    def __call__(self, params: Any) -> dict[str, float]:
        """Accuracies in [0, 1] of the teacher's features.

        Args:
          params: of the teacher's backbone.

        Returns:
          `knn/<name>/cls` and `knn/<name>/mean_patch`.
        """
        bank, bank_labels = self._compute(self.bank, params)
        queries, query_labels = self._compute(self.queries, params)
        return self._accuracies(bank, bank_labels, queries, query_labels, prefix="")

    def baselines(self, params: Any) -> dict[str, float]:
        """What the trained features are to be compared with; once, at step 0.

        Args:
          params: of a backbone at its random initialisation.

        Returns:
          By `knn/<name>/...`: `random_init_cls` and `random_init_mean_patch`; `raw_pixels`, of
          images resized to 32 px; `color_stats`, mean and standard deviation of each channel;
          `chance`, the share of the commonest class among the queries; and the counts
          `num_bank`, `num_queries`, `bad_images`.
        """
        bank, bank_labels = self._compute(self.bank, params)
        queries, query_labels = self._compute(self.queries, params)
        results = self._accuracies(bank, bank_labels, queries, query_labels, prefix="random_init_")
        bank, bank_labels = self._agreed(self.bank, baseline_features)
        queries, query_labels = self._agreed(self.queries, baseline_features)
        results |= self._accuracies(bank, bank_labels, queries, query_labels, prefix="")
        counts = {
            "chance": np.bincount(query_labels).max() / len(query_labels),
            "num_bank": len(bank_labels),
            "num_queries": len(query_labels),
            "bad_images": self.num_bad,
        }
        return results | {f"knn/{self.name}/{key}": float(x) for key, x in counts.items()}

    def _compute(self, images: ImageSet, params: Any) -> tuple[Arrays, np.ndarray]:
        return self._agreed(
            images, lambda slots: self._extractor(params, (image for image, _ in slots))
        )

    def _agreed(self, images: ImageSet, features_of: Callable) -> tuple[Arrays, np.ndarray]:
        """Features and labels of the images that every host could read.

        All hosts go through all slots: the features of a batch are computed by all together, and a
        host that left one out would make the others wait for ever.
        """
        labels = []

        def slots():
            for image, label in images.slots():
                labels.append(label)
                yield image, label

        features, labels = features_of(slots()), np.array(labels, np.int32)
        if jax.process_count() > 1:
            labels = multihost_utils.process_allgather(labels).min(axis=0)
        is_readable = labels != UNREADABLE
        if not is_readable.any():
            raise ValueError(f"none of the {len(labels)} images can be read ({images.what})")
        return {name: x[is_readable] for name, x in features.items()}, labels[is_readable]

    def _accuracies(self, bank, bank_labels, queries, query_labels, *, prefix: str):
        accuracies = {}
        (num_neighbors,) = self._vote["num_neighbors"]
        # Images of the bank that could not be read are not there to vote.
        vote = self._vote | {"num_neighbors": [min(num_neighbors, len(bank_labels))]}
        for kind in queries:
            by_k = knn_accuracy(
                bank_features=bank[kind],
                bank_labels=bank_labels,
                query_features=queries[kind],
                query_labels=query_labels,
                **vote,
            )
            (accuracies[f"knn/{self.name}/{prefix}{kind}"],) = by_k.values()
        return accuracies


def labelled_knn(
    *,
    name: str,
    bank: Source,
    queries: Source,
    apply: Callable[[Any, jax.Array], BackboneOutput],
    mean: Sequence[float],
    std: Sequence[float],
    num_neighbors: int = 20,
    temperature: float = 0.07,
    resize_size_px: int = 256,
    crop_size_px: int = 224,
    batch_size: int = 64,
    max_images: int = 50_000,
    num_channels: int = 3,
    max_image_pixels: int = 200_000_000,
    num_threads: int = 4,
    max_cached_mb: float = 1024,
    mesh: Mesh | None = None,
) -> InRunEvaluation:
    """kNN classification of labelled images, prepared as protocol C.1: resize, centred crop.

    Args:
      name: <name> in the metrics.
      bank: labelled source whose images vote.
      queries: labelled source whose images are classified; its classes must be the bank's.
      apply: (parameters, normalised images `[b, height, width, c]`) -> `BackboneOutput`.
      mean, std: of pixels in [0, 1], one per channel.
      num_neighbors: voters.
      temperature: of the vote.
      resize_size_px: of the short side.
      crop_size_px: of the centred crop; a multiple of the patch.
      batch_size: images at once.
      max_images: of each of bank and queries; which ones is always the same.
      num_channels: 1, 3 or 4.
      max_image_pixels: a larger image counts as unreadable.
      num_threads: that decode.
      max_cached_mb: decoded images of each set are kept in memory if all of them fit.
      mesh: of the parameters, see `FeatureExtractor`.

    Raises:
      ValueError: a source has no labels, fewer than two classes, or other classes than the bank.
    """
    reading = dict(
        resize_size_px=resize_size_px,
        crop_size_px=crop_size_px,
        num_channels=num_channels,
        max_images=max_images,
        max_image_pixels=max_image_pixels,
        num_threads=num_threads,
        max_cached_mb=max_cached_mb,
    )
    label_names = tuple(bank.label_names)
    return InRunEvaluation(
        name=name,
        bank=LabelledImages(bank, label_names=label_names, **reading),
        queries=LabelledImages(queries, label_names=label_names, **reading),
        extractor=FeatureExtractor(
            cls_and_mean_patch(apply), mean=mean, std=std, batch_size=batch_size, mesh=mesh
        ),
        num_neighbors=num_neighbors,
        temperature=temperature,
    )


def crop_identity(
    *,
    name: str,
    bank: Source,
    queries: Source,
    apply: Callable[[Any, jax.Array], BackboneOutput],
    mean: Sequence[float],
    std: Sequence[float],
    num_neighbors: int = 20,
    temperature: float = 0.07,
    crop_size_px: int = 224,
    crops_per_image: int = 10,
    crop_scale: tuple[float, float] = (0.05, 0.32),
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.2,
    hue: float = 0.1,
    batch_size: int = 64,
    max_images: int = 50_000,
    num_channels: int = 3,
    max_image_pixels: int = 200_000_000,
    mesh: Mesh | None = None,
) -> InRunEvaluation:
    """kNN of colour-jittered crops, whose label is the photo they come from.

    Bank and queries are two views of the same photos that share no pixel (`photos:left` and
    `photos:right`). Crops are made here, once, from a fixed seed that is not the run's: every
    evaluation of every run sees the same ones.

    Args:
      name: <name> in the metrics.
      bank: source of the photos whose crops vote.
      queries: source with the same record names, in any order.
      apply: (parameters, normalised images `[b, height, width, c]`) -> `BackboneOutput`.
      mean, std: of pixels in [0, 1], one per channel.
      num_neighbors: voters.
      temperature: of the vote.
      crop_size_px: of the crops; a multiple of the patch.
      crops_per_image: crops of each photo, in each of bank and queries.
      crop_scale: share of the area of what the source shows of the photo.
      aspect_ratio: width over height, before resizing.
      brightness, contrast, saturation, hue: strengths of the jitter that every crop gets.
      batch_size: crops at once.
      max_images: photos.
      num_channels: 1, 3 or 4.
      max_image_pixels: a larger photo counts as unreadable.
      mesh: of the parameters, see `FeatureExtractor`.

    Raises:
      ValueError: the sources do not hold the same photos, or fewer than two.
    """
    crops = identity_crops(
        bank,
        queries,
        crop_size_px=crop_size_px,
        crops_per_image=crops_per_image,
        crop_scale=crop_scale,
        aspect_ratio=aspect_ratio,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        max_images=max_images,
        num_channels=num_channels,
        max_image_pixels=max_image_pixels,
    )
    return InRunEvaluation(
        name=name,
        bank=crops[0],
        queries=crops[1],
        extractor=FeatureExtractor(
            cls_and_mean_patch(apply), mean=mean, std=std, batch_size=batch_size, mesh=mesh
        ),
        num_neighbors=num_neighbors,
        temperature=temperature,
    )
