"""Results: one JSON record per task, and one table of many, beside the paper's numbers.

Every number is in the unit that the paper prints: per cent for shares, metres for depth. A record
says what was run: protocol, weights, counts of the data, seed.
"""

import csv
import dataclasses
import io
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from dinov2_jax.evals.paper import paper_number
from dinov2_jax.storage import write_whole

RESULT_FILE = "result.json"
TABLE_STEM = "table"
COLUMNS = (
    "entry",
    "dataset",
    "task",
    "metric",
    "value",
    "paper",
    "model",
    "images",
    "seed",
    "seconds",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a task found.

    Attributes:
      metrics: by name, in the paper's unit.
      headline: those of the table, in its order. One that is named "DATASET/METRIC" is of another
        data set than the record's, as where one probe is tested on several.
      protocol: every setting that was decided while it ran, such as sizes and chosen grid points.
      counts: of images, classes, queries.
      details: anything else of interest, JSON: per class, per grid point.
    """

    metrics: Mapping[str, float]
    headline: Sequence[str]
    protocol: Mapping[str, Any]
    counts: Mapping[str, int]
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        missing = [name for name in self.headline if name not in self.metrics]
        if missing:
            raise ValueError(f"headline {missing} must be among the metrics {list(self.metrics)}")
        bad = [name for name, value in self.metrics.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(f"metrics {bad} must be finite; look at the features and labels")


def write_record(out: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Writes `result.json`, whole or not at all, and the table of this one entry."""
    out.mkdir(parents=True, exist_ok=True)
    write_whole(epath.Path(out / RESULT_FILE), json.dumps(record, indent=2) + "\n")
    write_tables(out, {entry_name(out): record})


def entry_name(out: pathlib.Path) -> str:
    """What the result in a folder is called in a table: as the folder."""
    return os.path.basename(os.path.abspath(out))


def read_record(out: pathlib.Path) -> dict[str, Any] | None:
    """The record in a folder; None where there is none.

    Raises:
      ValueError: it is damaged.
    """
    path = out / RESULT_FILE
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, or choose another --out") from (
            error
        )


def rows(records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table, `COLUMNS` each: every headline metric of every entry's record."""
    found = []
    for entry, record in records.items():
        for name in record["headline"]:
            dataset, _, metric = name.rpartition("/")
            dataset = dataset or record["dataset"]
            found.append(
                {
                    "entry": entry,
                    "dataset": dataset,
                    "task": record["task"],
                    "metric": metric,
                    "value": record["metrics"][name],
                    "paper": paper_number(
                        dataset=dataset,
                        task=record["task"],
                        metric=metric,
                        model=record["model"],
                    ),
                    "model": record["model"]["name"],
                    "images": _num_images(record["counts"], name),
                    "seed": record["seed"],
                    "seconds": record["seconds"],
                }
            )
    return found


def _num_images(counts: Mapping[str, int], name: str) -> int:
    dataset, is_other, _ = name.rpartition("/")
    if is_other:
        return counts.get(f"{dataset}/images", 0)
    return sum(counts.get(key, 0) for key in ("train", "test"))


def to_markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """The table for people."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(_shown(row[key]) for key in COLUMNS) + " |" for row in found]
    return "\n".join(lines) + "\n"


def to_csv(found: Sequence[Mapping[str, Any]]) -> str:
    """The table for a spreadsheet, numbers in full."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def write_tables(out: pathlib.Path, records: Mapping[str, Mapping[str, Any]]) -> str:
    """Writes `table.md`, `table.csv` and `table.json` of entries; returns the first."""
    found = rows(records)
    texts = {".md": to_markdown(found), ".csv": to_csv(found)}
    texts[".json"] = json.dumps(found, indent=2) + "\n"
    for suffix, text in texts.items():
        write_whole(epath.Path(out / f"{TABLE_STEM}{suffix}"), text)
    return texts[".md"]


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value).replace("|", "\\|")
