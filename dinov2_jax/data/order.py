"""Which record comes when: a pure function of (seed, position in the global order). Numpy only.

Each source is read in passes, every pass a new permutation of all its records; sources of a
mixture take turns by a fixed table. Unlike the reference, whose sampler restarts its shuffle at a
resume (dinov2/data/samplers.py), any position can be looked up without those before it.
"""

import functools

import numpy as np

from dinov2_jax.data.records import DataError

# Streams of random numbers: rng(seed, stream, index) never depends on another stream's use.
ORDER, ELEMENT, MASKS, REPLACEMENT = range(4)

_TABLE_SIZE = 1 << 16  # turns after which a mixture's table repeats
_MAX_PERMUTED = 1 << 20  # larger sources are shuffled by a cipher, without a table


def stream_rng(seed: int, stream: int, *index: int) -> np.random.Generator:
    """The generator of one stream at one index."""
    return np.random.default_rng([seed, stream, *index])


class Order:
    """The global order over one or several sources, whose records are numbered through."""

    def __init__(self, lengths: tuple[int, ...], *, seed: int, weights: tuple[float, ...] = ()):
        """Prepares the order.

        Args:
          lengths: records of each source.
          seed: at least 0.
          weights: share of each source in every stretch of the order; need not sum to 1.
            Empty: by length.
        """
        self._lengths = lengths
        self._offsets = np.cumsum([0, *lengths]).tolist()
        self._seed = seed
        self._turns, self._ranks, self._counts = _turn_table(weights or lengths)

    def record(self, position: int) -> int:
        """Record at a position of the global order."""
        source, turn = self._locate(position)
        length = self._lengths[source]
        pass_index, in_pass = divmod(turn, length)
        return self._offsets[source] + _shuffled(
            in_pass, length, (self._seed, ORDER, source, pass_index)
        )

    def replacement(self, position: int, attempt: int) -> int:
        """Record to try, from the same source, where that of `position` cannot be read."""
        source, _ = self._locate(position)
        rng = stream_rng(self._seed, REPLACEMENT, position, attempt)
        return self._offsets[source] + int(rng.integers(self._lengths[source]))

    def _locate(self, position: int) -> tuple[int, int]:
        if len(self._lengths) == 1:
            return 0, position
        cycle, turn = divmod(position, len(self._turns))
        source = int(self._turns[turn])
        return source, cycle * self._counts[source] + int(self._ranks[turn])


def _shuffled(in_pass: int, length: int, seed: tuple[int, ...]) -> int:
    if length <= _MAX_PERMUTED:
        return int(_permutation(length, seed)[in_pass])
    # Grain imports jax if it is there; data/ itself does not need it.
    from grain.experimental import index_shuffle

    return index_shuffle(in_pass, max_index=length - 1, seed=_seed32(seed), rounds=4)


@functools.lru_cache(maxsize=8)
def _permutation(length: int, seed: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).permutation(length).astype(np.uint32)


@functools.lru_cache(maxsize=64)
def _seed32(seed: tuple[int, ...]) -> int:
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def _turn_table(weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Whose turn it is, spread as evenly as whole turns allow.

    Returns:
      turns: [table size] source of each turn.
      ranks: [table size] earlier turns of that source in the table.
      counts: turns of each source in the table.
    """
    shares = np.asarray(weights, np.float64)
    if not (np.isfinite(shares).all() and (shares > 0).all()):
        raise DataError(f"weights={tuple(weights)} must be positive numbers; leave a source out")
    ideal = shares / shares.sum() * _TABLE_SIZE
    counts = np.maximum(np.floor(ideal).astype(np.int64), 1)
    # The turns left over go to the largest remainders.
    by_remainder = np.argsort(counts - ideal, kind="stable")
    counts[by_remainder[: max(_TABLE_SIZE - counts.sum(), 0)]] += 1
    # Turn j of a source that has `count` of them is due at (j + 1/2) / count of the cycle.
    due = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    turns = np.repeat(np.arange(len(counts)), counts)[np.argsort(due, kind="stable")]
    ranks = np.empty(len(turns), np.int64)
    for source in range(len(counts)):
        ranks[turns == source] = np.arange(counts[source])
    return turns.astype(np.int32), ranks, counts.tolist()
