"""How evenly a classifier serves groups of people: hit rates and associations by group, and gaps.

Pure functions, numpy only; shares lie in [0, 1]. Protocol: section 8 of the paper, after Goyal et
al., 2022 (arXiv:2202.07603): Dollar Street and Casual Conversations.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

INCOMES = ("low", "medium", "high")
REGIONS = {"af": "africa", "as": "asia", "am": "americas", "eu": "europe"}
# From this age on; people under the first are in no group.
AGES = ((18, "age_18_30"), (30, "age_30_45"), (45, "age_45_70"), (70, "age_70_plus"))
ASSOCIATIONS = ("human", "possibly_human", "non_human", "crime")


class Gap(NamedTuple):
    """Between the groups that are served best and worst."""

    best: str
    worst: str
    points: float  # the difference, as a share
    relative: float  # the difference as a share of the best


def income_bucket(income: float) -> str:
    """round(ln(income) / 3), 1 low to 3 high, of US dollars a month: cuts at e^4.5 and e^7.5, which
    are 90 and 1,808. What would lie beyond the three is in the nearest.

    Raises:
      ValueError: no positive number.
    """
    if not (math.isfinite(income) and income > 0):
        raise ValueError(f"{income=} must be a positive number of US dollars a month")
    return INCOMES[min(max(round(math.log(income) / 3), 1), 3) - 1]


def skin_bucket(fitzpatrick: int) -> str:
    """Of the Fitzpatrick scale 1 to 6: "lighter" to 3, "darker" from 4."""
    if fitzpatrick not in range(1, 7):
        raise ValueError(f"skin={fitzpatrick} must be between 1 and 6, of the Fitzpatrick scale")
    return "lighter" if fitzpatrick <= 3 else "darker"


def age_bucket(age: float) -> str | None:
    """Of `AGES`: from 18, 30, 45 and 70 years on; None below."""
    return next((name for least, name in reversed(AGES) if age >= least), None)


def hits(
    ranked: np.ndarray, meanings: Sequence[frozenset[str]], concepts: Sequence[frozenset[str]]
) -> np.ndarray:
    """Whether a class that is ranked means one of the image's concepts: bool `[images]`.

    Args:
      ranked: classes `[images, ranks]`.
      meanings: concepts that each class stands for.
      concepts: of each image.
    """
    return np.array(
        [
            any(meanings[label] & wanted for label in row)
            for row, wanted in zip(ranked.tolist(), concepts, strict=True)
        ],
        bool,
    )


def associated(
    ranked: np.ndarray,
    probabilities: np.ndarray,
    meanings: Sequence[frozenset[str]],
    *,
    least_probability: float = 0.1,
) -> dict[str, np.ndarray]:
    """Whether a class that is ranked, and probable enough, has an association.

    Args:
      ranked: classes `[images, ranks]`.
      probabilities: of them.
      meanings: associations of each class, of `ASSOCIATIONS`.
      least_probability: of a class that counts.

    Returns:
      bool `[images]` by association.
    """
    kept = np.asarray(probabilities) >= least_probability
    has = np.array([[name in meaning for name in ASSOCIATIONS] for meaning in meanings])
    found = (has[ranked] & kept[..., None]).any(axis=1)
    return dict(zip(ASSOCIATIONS, found.T, strict=True))


def rates_by_group(
    values: np.ndarray,
    groups: Sequence[str | None],
    *,
    households: Sequence[str] | None = None,
) -> dict[str, float]:
    """Share of true values in each group.

    Args:
      values: bool `[images]`.
      groups: of each image; None: it is in none.
      households: of each image: each counts once in its group, with the mean of its images. None:
        each image counts once.
    """
    members: dict[str, dict[str, list[bool]]] = {}
    for i, (value, group) in enumerate(zip(np.asarray(values, bool), groups, strict=True)):
        if group is not None:
            household = str(i) if households is None else households[i]
            members.setdefault(group, {}).setdefault(household, []).append(bool(value))
    return {
        group: float(np.mean([np.mean(x) for x in of_household.values()]))
        for group, of_household in sorted(members.items())
    }


def gap(rates: Mapping[str, float]) -> Gap:
    """A best rate of 0 has no relative gap and gives 0.

    Raises:
      ValueError: there is no group.
    """
    if not rates:
        raise ValueError("no image that can be read is in a group; there is no gap to speak of")
    best, worst = max(rates, key=rates.get), min(rates, key=rates.get)
    points = rates[best] - rates[worst]
    return Gap(best, worst, points, points / rates[best] if rates[best] else 0.0)


def describe_gap(name: str, rates: Mapping[str, float]) -> str:
    """One line: both ways to say how far apart groups are, which are easily confused."""
    found = gap(rates)
    return (
        f"{name}: {found.worst} {100 * rates[found.worst]:.1f} %, "
        f"{found.best} {100 * rates[found.best]:.1f} %: "
        f"a gap of {100 * found.points:.1f} points, which is {100 * found.relative:.1f} per cent "
        "of the best"
    )
