"""Retrieval sets on disk: a database, queries, and what each query should find."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dinov2_jax.data.image_ops import IMAGE_SUFFIXES
from dinov2_jax.data.records import DataError
from dinov2_jax.evals import safe_pickle
from dinov2_jax.evals.retrieval import DISTRACTOR, LEVELS, PLAIN_LEVELS

LAYOUT = """one of
  gnd_roxford5k.pkl and jpg/           revisited Oxford or Paris, as published
  MET_database.json, valset.json, testset.json (or in ground_truth/) and images/     the Met
  old/ and new/                        AmsterTime: images of one name are a pair
  list.json, or another .json file, of your own; paths are relative to it:
    {"database": ["a.jpg", "b.jpg"],
     "queries": [{"image": "q.jpg", "positive": ["a.jpg"], "junk": ["b.jpg"]}]}
    with "easy" and "hard" in place of "positive": three levels, as revisited Oxford;
    with "box": [left, top, right, bottom] in px of the query, for --query-boxes"""
LIST_FILE = "list.json"  # of a folder
_QUERY_KEYS = {"image", "positive", "easy", "hard", "junk", "box"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalSet:
    """What is searched, and what should be found.

    Attributes:
      kind: "revisited", "amstertime" or "list".
      database, queries: paths of images.
      relevant: rows of the database by kind ("easy", "hard", "positive", "junk"), for each query.
      boxes: (left, top, right, bottom) in px of each query; None where it has none.
    """

    kind: str
    database: Sequence[str]
    queries: Sequence[str]
    relevant: Sequence[Mapping[str, Sequence[int]]]
    boxes: Sequence[Sequence[float] | None]

    @property
    def levels(self) -> Mapping[str, tuple[Sequence[str], Sequence[str]]]:
        """Kinds that are positive and junk, by level of difficulty."""
        is_graded = self.kind == "revisited" or any(x.get("hard") for x in self.relevant)
        is_graded |= any(x.get("easy") for x in self.relevant)
        return LEVELS if is_graded else PLAIN_LEVELS

    def rows(self, kinds: Sequence[str]) -> list[list[int]]:
        """Rows of these kinds, for each query."""
        return [[row for kind in kinds for row in x.get(kind, ())] for x in self.relevant]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetSet:
    """The Met: images with labels. Queries that show no object of it have `DISTRACTOR`."""

    database: Sequence[str]
    database_labels: np.ndarray
    val: Sequence[str]
    val_labels: np.ndarray
    test: Sequence[str]
    test_labels: np.ndarray


def open_retrieval(data: str, *, mini: bool = False) -> RetrievalSet | MetSet:
    """Opens whichever set lies there; see `LAYOUT`.

    Args:
      data: a folder, or a .json file.
      mini: of the Met, its small database.

    Raises:
      DataError: nothing known, or something of it is wrong.
    """
    path = pathlib.Path(data).expanduser()
    if path.suffix == ".json":
        return _open_list(path)
    if (path / LIST_FILE).exists():
        return _open_list(path / LIST_FILE)
    ground_truths = sorted([*path.glob("gnd_*.pkl"), *path.glob("gnd_*.json")])
    if ground_truths:
        return _open_revisited(path, ground_truths[0])
    for folder in (path / "ground_truth", path):
        if (folder / "testset.json").exists():
            return _open_met(path, folder, mini=mini)
    if (path / "old").is_dir() and (path / "new").is_dir():
        return _open_amstertime(path)
    raise DataError(f"{path} holds no retrieval set; expected {LAYOUT}")


def _open_revisited(root: pathlib.Path, path: pathlib.Path) -> RetrievalSet:
    content = safe_pickle.load(path) if path.suffix == ".pkl" else _read_json(path)
    try:
        names = {key: [str(name) for name in content[key]] for key in ("imlist", "qimlist")}
        truths = [dict(truth) for truth in content["gnd"]]
        relevant = [
            {kind: [int(row) for row in truth[kind]] for kind in ("easy", "hard", "junk")}
            for truth in truths
        ]
        boxes = [[float(x) for x in truth["bbx"]] if "bbx" in truth else None for truth in truths]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"{path} must hold imlist, qimlist and gnd (easy, hard, junk of each query), as "
            f"published: {type(error).__name__} {error}"
        ) from error
    size = len(names["imlist"])
    if len(relevant) != len(names["qimlist"]):
        raise DataError(f"{path}: gnd and qimlist must have one entry for each query")
    for name, found in zip(names["qimlist"], relevant, strict=True):
        for kind, rows in found.items():
            if any(not 0 <= row < size for row in rows):
                raise DataError(
                    f"{path}: {kind} images of {name} must be numbered from 0 to {size - 1}"
                )
    paths = {key: [str(root / "jpg" / f"{x}.jpg") for x in found] for key, found in names.items()}
    return RetrievalSet(
        kind="revisited",
        database=paths["imlist"],
        queries=paths["qimlist"],
        relevant=relevant,
        boxes=boxes,
    )


def _open_met(root: pathlib.Path, folder: pathlib.Path, *, mini: bool) -> MetSet:
    fields = {}
    database = "mini_MET_database.json" if mini else "MET_database.json"
    for name, file, key in (
        ("database", database, "id"),
        ("val", "valset.json", "MET_id"),
        ("test", "testset.json", "MET_id"),
    ):
        entries = _read_json(folder / file)
        try:
            fields[name] = [str(root / "images" / entry["path"]) for entry in entries]
            found = [
                int(entry[key] if name == "database" else entry.get(key, -1)) for entry in entries
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{folder / file} must be a list of records with path and {key}: {error}"
            ) from error
        if not found:
            raise DataError(f"{folder / file} must name at least one image")
        fields[f"{name}_labels"] = np.array(found)
    if (fields["database_labels"] == DISTRACTOR).any():
        raise DataError(f"{folder / database}: ids must not be {DISTRACTOR}")
    return MetSet(**fields)


def _open_amstertime(root: pathlib.Path) -> RetrievalSet:
    old, new = (
        {x.stem: str(x) for x in sorted((root / name).iterdir()) if _is_image(x)}
        for name in ("old", "new")
    )
    alone = sorted(old.keys() ^ new.keys())
    if alone or not old:
        raise DataError(
            f"{root}/old and new must hold images of the same names, at least one; "
            f"{alone[:3]} are in one alone"
        )
    names = sorted(old)
    return RetrievalSet(
        kind="amstertime",
        database=[new[name] for name in names],
        queries=[old[name] for name in names],
        relevant=[{"positive": [i]} for i in range(len(names))],
        boxes=[None] * len(names),
    )


def _open_list(path: pathlib.Path) -> RetrievalSet:
    content = _read_json(path)
    if not isinstance(content, dict) or set(content) != {"database", "queries"}:
        raise DataError(f"{path} must have the keys database and queries alone; expected {LAYOUT}")
    database = content["database"]
    if not _is_list(database, str) or not _is_list(content["queries"], dict):
        raise DataError(f"{path}: database must be a list of paths, and queries of records")
    row_of = {name: row for row, name in enumerate(database)}
    if not database or len(row_of) != len(database):
        raise DataError(f"{path}: database must name at least one image, and none twice")
    if not content["queries"]:
        raise DataError(f"{path}: queries must have one at least; expected {LAYOUT}")
    queries, relevant, boxes = [], [], []
    for query in content["queries"]:
        unknown = set(query) - _QUERY_KEYS
        if unknown or "image" not in query:
            raise DataError(
                f"{path}: a query has image, and of {sorted(_QUERY_KEYS - {'image'})} what it "
                f"needs; found {sorted(query)}"
            )
        _check_query(path, query)
        relevant.append(_relevant(path, query, row_of))
        queries.append(str(path.parent / query["image"]))
        boxes.append(query.get("box"))
    if any(x["positive"] for x in relevant) and any(x["easy"] or x["hard"] for x in relevant):
        raise DataError(f"{path}: all queries have positive images, or all have easy and hard ones")
    return RetrievalSet(
        kind="list",
        database=[str(path.parent / name) for name in database],
        queries=queries,
        relevant=relevant,
        boxes=boxes,
    )


def _check_query(path: pathlib.Path, query: Mapping[str, Any]) -> None:
    """Raises DataError where a query's entries are not of the kinds expected."""
    if not isinstance(query["image"], str):
        raise DataError(f"{path}: image {query['image']!r} of a query must be a path")
    for kind in ("positive", "easy", "hard", "junk"):
        if not _is_list(query.get(kind, []), str):
            raise DataError(f"{path}: {kind} of query {query['image']} must be a list of paths")
    box = query.get("box")
    if box is not None and (not _is_list(box, (int, float)) or len(box) != 4):
        raise DataError(
            f"{path}: box {box!r} of query {query['image']} must be [left, top, right, bottom]"
        )


def _is_list(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(isinstance(x, kind) for x in value)


def _relevant(
    path: pathlib.Path, query: Mapping[str, Any], row_of: Mapping[str, int]
) -> dict[str, list[int]]:
    name = query["image"]
    found = {}
    for kind in ("positive", "easy", "hard", "junk"):
        missing = [x for x in query.get(kind, ()) if x not in row_of]
        if missing:
            raise DataError(
                f"{path}: {kind} images {missing[:3]} of query {name} must be in the database"
            )
        found[kind] = [row_of[x] for x in query.get(kind, ())]
    if found["positive"] and (found["easy"] or found["hard"]):
        raise DataError(f"{path}: query {name} has positive, or easy and hard images, not both")
    rows = [row for rows in found.values() for row in rows]
    if len(set(rows)) < len(rows):
        raise DataError(f"{path}: query {name} names an image twice; it is of one kind, once")
    # A query that is in the database finds itself first, which shows nothing.
    if name in row_of and row_of[name] not in rows:
        found["junk"].append(row_of[name])
    return found


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path} is not there; expected {LAYOUT}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def _is_image(path: pathlib.Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
