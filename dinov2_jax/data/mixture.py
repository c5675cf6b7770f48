"""Several sources as one: their records are numbered through, their shares given by weights."""

import numpy as np

from dinov2_jax.data.records import DataError, Record, Source


class Mixture(Source):
    """Records of all sources, for training: labels of different sources do not mix.

    Attributes:
      sources: the parts.
      weights: share of each part in the global order (`order.Order`), any positive scale.
    """

    kind = "a mixture of"

    def __init__(self, sources: list[Source], weights: list[float]):
        """Joins the sources.

        Raises:
          DataError: nothing to mix, or a weight that is not positive.
        """
        if not sources or len(sources) != len(weights):
            raise DataError(
                f"a mixture of {len(sources)} sources with {len(weights)} weights; give "
                "((path, weight), ...)"
            )
        if not all(np.isfinite(weight) and weight > 0 for weight in weights):
            raise DataError(f"{weights=} must be positive numbers; leave a source out instead")
        self.sources, self.weights = list(sources), [float(weight) for weight in weights]
        self.path = ", ".join(source.path for source in sources)
        self.rejected = [item for source in sources for item in source.rejected]
        self.num_other_files = sum(source.num_other_files for source in sources)
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        source, position = self._locate(index)
        return source[position]._replace(label=None)

    def name(self, index: int) -> str:
        source, position = self._locate(index)
        return source.name(position)

    def describe(self) -> str:
        total = sum(self.weights)
        parts = zip(self.weights, self.sources, strict=True)
        shares = "; ".join(f"{w / total:.1%} {source.describe()}" for w, source in parts)
        return f"mixture of {len(self.sources)} sources: {shares}"

    def _locate(self, index: int) -> tuple[Source, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[part], index - (int(self._ends[part - 1]) if part else 0)
