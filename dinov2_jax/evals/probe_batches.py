"""What a linear probe is trained on: features of fixed images from the cache, or of random crops.

Both are functions from positions in an endless shuffled order to features and labels, so that a
probe goes on anywhere, and a host reads its own part of a batch alone.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from dinov2_jax.data.ahead import map_ahead
from dinov2_jax.data.image_ops import decode
from dinov2_jax.data.multicrop import random_resized_crop
from dinov2_jax.data.order import Order, stream_rng
from dinov2_jax.data.records import BadImage, DataError, Source
from dinov2_jax.evals.splits import check_labels
from dinov2_jax.features.fill import FINITE, make_extractor
from dinov2_jax.features.outputs import make_compute, parse_what
from dinov2_jax.features.read import FeatureSet
from dinov2_jax.model import Model

CROP_SCALE = (0.08, 1.0)
_CROPS = 4  # stream of random numbers, beside those of `data.order`
_NUM_TRIES = 100
_ROWS_AT_ONCE = 1024


def what_for(num_layers: int) -> str:
    """What to extract for a probe of so many layers; with CLS, so that it serves k-NN too."""
    return f"cls,layers={num_layers}"


def probe_features(arrays: Mapping[str, np.ndarray], rows=slice(None)) -> np.ndarray:
    """float32 `[.., width]` of rows of what `what_for` extracts, of any shape."""
    cls, mean = arrays["layers_cls"][rows], arrays["layers_mean"][rows, -1]
    return np.concatenate([cls.reshape(*cls.shape[:-2], -1), mean], axis=-1).astype(np.float32)


def probe_pieces(features: FeatureSet) -> Iterator[np.ndarray]:
    """`probe_features` of all rows, in order, a piece at a time."""
    for start in range(0, len(features), _ROWS_AT_ONCE):
        yield probe_features(features.arrays, slice(start, start + _ROWS_AT_ONCE))


class CachedBatches:
    """Features that lie on disk; every image is as the evaluation sees it."""

    def __init__(self, features: FeatureSet, labels: np.ndarray, *, seed: int):
        """Binds features of `what_for` and integer labels `[rows]`."""
        self._features, self._labels = features, np.asarray(labels, np.int32)
        self._order = Order((len(features),), seed=seed)

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features `[.., width]` and labels `[..]` at positions `[..]` of the order."""
        rows = [self._order.record(position) for position in positions.ravel().tolist()]
        rows = np.reshape(rows, positions.shape)
        return probe_features(self._features.arrays, rows), self._labels[rows]


class AugmentedBatches:
    """A random resized crop, flipped or not, of every image, through the network at each use.

    An image that cannot be read is replaced by another; the crop depends on seed and position.
    """

    def __init__(
        self,
        model: Model,
        source: Source,
        *,
        num_layers: int,
        crop_size_px: int,
        per_device_batch_size: int,
        num_threads: int,
        seed: int,
    ):
        """Binds a labelled source.

        Args:
          model: frozen.
          source: with labels.
          num_layers: of the features.
          crop_size_px: of the crops.
          per_device_batch_size: images at once in the network, on each device of this host.
          num_threads: that decode.
          seed: of order and crops.
        """
        spec = model.spec
        outputs = parse_what(
            what_for(num_layers), depth=spec.depth, num_register_tokens=spec.num_register_tokens
        )
        compute = make_compute(model, outputs, norm=True, dtype=np.dtype(np.float32))
        self._params, self._extractor = make_extractor(model, compute, per_device_batch_size)
        self._source, self._order, self._seed = source, Order((len(source),), seed=seed), seed
        self._crop_size_px, self._num_channels = crop_size_px, spec.in_channels
        self._num_threads = num_threads

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features `[.., width]` and labels `[..]` at positions `[..]` of the order."""
        labels = []

        def crops() -> Iterator[np.ndarray]:
            ahead = 2 * max(self._extractor.batch_size, self._num_threads)
            items = map_ahead(
                self._read, positions.ravel().tolist(), num_threads=self._num_threads, ahead=ahead
            )
            for crop, label in items:
                labels.append(label)
                yield crop

        arrays = self._extractor(self._params, crops())
        if not arrays[FINITE].all():
            raise ValueError("features must be finite; the model's weights are not sound")
        features, labels = probe_features(arrays), np.array(labels, np.int32)
        names = self._source.label_names
        check_labels(labels, num_classes=len(names), at=self._source.describe())
        shape = positions.shape
        return features.reshape(*shape, -1), labels.reshape(shape)

    def _read(self, position: int) -> tuple[np.ndarray, int]:
        rng = stream_rng(self._seed, _CROPS, position)
        index = self._order.record(position)
        for attempt in range(_NUM_TRIES):
            try:
                record = self._source[index]
                image = decode(record.image, num_channels=self._num_channels)
                break
            except BadImage:
                index = self._order.replacement(position, attempt)
        else:
            raise DataError(
                f"{_NUM_TRIES} images in a row of {self._source.describe()} cannot be read; "
                "repair or remove them"
            )
        crop = random_resized_crop(image, rng, size_px=self._crop_size_px, scale=CROP_SCALE)
        return (crop[:, ::-1] if rng.random() < 0.5 else crop), record.label
