"""What every evaluation is: a task with its flags, the layout of its data, and a run of it.

A task's file in `evals/tasks` is its door: it turns flags and a folder into arguments of pure
functions, and what they return into a `Result`.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from dinov2_jax import distributed
from dinov2_jax.data.records import Source
from dinov2_jax.evals.feature_cache import cached_features
from dinov2_jax.evals.results import Result
from dinov2_jax.evals.splits import check_labels
from dinov2_jax.features.read import FeatureSet
from dinov2_jax.model import Model
from dinov2_jax.visualize.sheets import Sheet, save


@dataclasses.dataclass(frozen=True)
class Task:
    """A protocol that can be run by name.

    Attributes:
      name: on the command line.
      summary: one line.
      layout: what `--data` must hold, as a drawing of the folder; shown by `--help` and in errors.
      add_flags: adds the task's own flags to a parser.
      run: does it all.
      reads_urls: whether `--data` may be at a URL, or must be on a disk.
    """

    name: str
    summary: str
    layout: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[["Run"], Result]
    reads_urls: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One task on one model and one data set.

    Attributes:
      flags: all of them, the common ones and the task's.
      model: frozen.
      data: as given: a path, or what `data.sources.open_source` takes.
      dataset: its name in tables and titles.
      out: the folder of the results.
      cache: the folder of features, which several tasks may share.
      seed: of every choice that the task makes.
      batch_size: images at once on each device.
      num_threads: that decode.
      say: prints a line, on the primary process alone.
    """

    flags: argparse.Namespace
    model: Model
    data: str
    dataset: str
    out: pathlib.Path
    cache: pathlib.Path
    seed: int
    batch_size: int
    num_threads: int | None
    say: Callable[[str], None]

    @property
    def is_primary(self) -> bool:
        """Whether this process is the one that writes."""
        return distributed.is_primary()

    def features(self, source: Source | str, *, what: str = "cls", **sizes: Any) -> FeatureSet:
        """Features of a source, computed once and kept in `cache`.

        Args:
          source: images.
          what: see `dinov2_jax.features.outputs.parse_what`.
          **sizes: `resize_size_px`, `crop_size_px`, `crop`, `norm`: see `features.extract`.
        """
        return cached_features(
            self.model,
            source,
            self.cache,
            what=what,
            per_device_batch_size=self.batch_size,
            num_threads=self.num_threads,
            quiet=not self.is_primary,
            **sizes,
        )

    def draw(self, make: Callable[[], Mapping[str, Sheet]]) -> None:
        """Writes sheets into `out` by the names of their files, on the primary process alone.

        Every process must call it, whatever it has to show: none goes on unless they are written.
        """

        def write() -> None:
            self.out.mkdir(parents=True, exist_ok=True)
            for file, sheet in make().items():
                save(sheet, epath.Path(self.out / file))

        distributed.on_primary(write)


def require_labels(features: FeatureSet, *, at: str, layout: str) -> np.ndarray:
    """The labels `[rows]` of a set of at least two classes.

    Raises:
      ValueError: it has none, or a single class, and the message shows the layout expected; or a
        label is out of range.
    """
    if features.labels is not None:
        check_labels(features.labels, num_classes=len(features.label_names), at=at)
    classes = 0 if features.labels is None else len(np.unique(features.labels))
    require_classes(classes, at=at, layout=layout)
    return features.labels


def require_classes(count: int, *, at: str, layout: str) -> None:
    """Raises ValueError, showing the layout expected, for fewer than two classes."""
    if count < 2:
        raise ValueError(
            f"{at} must hold images of two or more classes, found {count}; expected: {layout}"
        )
