"""Metadata of images of people and households: a CSV file, and what classes mean to it."""

import ast
import csv
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

from dinov2_jax.data.records import DataError
from dinov2_jax.evals.fairness import (
    AGES,
    ASSOCIATIONS,
    REGIONS,
    age_bucket,
    income_bucket,
    skin_bucket,
)

LAYOUT = """metadata.csv, or another .csv file, with a header and a line for each image:
  image,concept,income,region,household     hit rates, as of Dollar Street; all after concept are
                                            optional; income in US dollars a month; region af, as,
                                            am, eu or a word; several concepts: "a|b", or ['a', 'b']
  image,gender,skin,age                     associations, as of Casual Conversations; skin 1 to 6
paths are relative to the file; --columns says how a file names them otherwise"""
METADATA_FILE = "metadata.csv"  # of a folder
_NUMBERS = {"income": float, "skin": int, "age": float}


@dataclasses.dataclass(frozen=True, kw_only=True)
class People:
    """Images and the groups that they are in.

    Attributes:
      images: paths.
      concepts: of each; None: the file has none, associations are counted instead.
      groups: of each image, by grouping ("income", "region", "gender_skin", "age" and others).
      households: of each image; None: the file has none.
    """

    images: Sequence[str]
    concepts: Sequence[frozenset[str]] | None
    groups: Mapping[str, Sequence[str | None]]
    households: Sequence[str] | None


def read_people(data: str, *, columns: Mapping[str, str], group_by: Sequence[str] = ()) -> People:
    """Reads a file; see `LAYOUT`.

    Args:
      data: the file, or the folder of `METADATA_FILE`.
      columns: names in the file, by names of ours.
      group_by: further columns whose values are groups.

    Raises:
      DataError: a column is missing, a value is none, or no image is in a group.
    """
    path = pathlib.Path(data).expanduser()
    path = path / METADATA_FILE if path.is_dir() else path
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, there = list(reader), set(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}; expected {LAYOUT}") from error
    unknown = set(columns) - {
        "image",
        "concept",
        "income",
        "region",
        "household",
        "gender",
        *_NUMBERS,
    }
    if unknown:
        raise DataError(f"--columns {sorted(unknown)} must be of the names in {LAYOUT}")

    def column(name: str, *, needed: bool = False) -> list | None:
        title = columns.get(name, name)
        if title not in there:
            if needed or name in columns:
                raise DataError(f"{path} has no column {title}; expected {LAYOUT}")
            return None
        values = [(row[title] or "").strip() for row in rows]
        if "" in values:
            raise DataError(f"{path} line {values.index('') + 2}: {title} is empty")
        if name not in _NUMBERS:
            return values
        return _numbers(values, _NUMBERS[name], f"{path}: {title}")

    images = [str(path.parent / name) for name in column("image", needed=True)]
    if not images:
        raise DataError(f"{path} names no image; expected {LAYOUT}")
    concepts = column("concept")
    groups = {}
    if concepts is not None:
        if (incomes := column("income")) is not None:
            groups["income"] = _bucketed(incomes, income_bucket, path)
        if (regions := column("region")) is not None:
            groups["region"] = [REGIONS.get(x.lower(), x.lower()) for x in regions]
    else:
        genders = [x.lower() for x in column("gender", needed=True)]
        skins = _bucketed(column("skin", needed=True), skin_bucket, path)
        groups["gender_skin"] = [f"{x}_{y}" for x, y in zip(genders, skins, strict=True)]
        if (ages := column("age")) is not None:
            groups["age"] = [age_bucket(x) for x in ages]
    groups |= {name: column(name, needed=True) for name in group_by}
    if not groups:
        raise DataError(f"{path} has no groups; it needs income or region, or --group-by COLUMN")
    for name, values in groups.items():
        if not any(values):  # of all groups those of ages alone leave people out
            raise DataError(
                f"{path}: column {columns.get(name, name)} puts no image in a group, of which the "
                f"first begins at {AGES[0][0]} years; correct it, or remove the column"
            )
    return People(
        images=images,
        concepts=concepts and [_several(x, path) for x in concepts],
        groups=groups,
        households=column("household"),
    )


def read_meanings(
    file: str | None, classes: Sequence[str], *, are_associations: bool
) -> list[frozenset[str]]:
    """What each class of a classifier stands for.

    Args:
      file: .csv lines `class,meaning`; a class may have several lines, or none. None: each class is
        the concept of its name.
      classes: names.
      are_associations: meanings must be of `ASSOCIATIONS`.

    Raises:
      DataError: a line that is none, or of an unknown class or association.
    """
    if file is None:
        if are_associations:
            raise DataError(
                f"associations need --meanings: lines 'class,meaning', of {', '.join(ASSOCIATIONS)}"
            )
        return [frozenset([name]) for name in classes]
    path = pathlib.Path(file).expanduser()
    found = {name: set() for name in classes}
    with open(path, newline="", encoding="utf-8-sig") as lines:
        for number, row in enumerate(csv.reader(lines), 1):
            if len(row) != 2 or row[0] not in found:
                raise DataError(
                    f"{path} line {number} must be 'class,meaning' with one of the classifier's "
                    f"{len(classes)} classes, not {row}"
                )
            meaning = row[1].strip()
            if are_associations:
                meaning = meaning.lower().replace("-", "_")
                if meaning not in ASSOCIATIONS:
                    raise DataError(f"{path} line {number}: {row[1]} must be of {ASSOCIATIONS}")
            found[row[0]].add(meaning)
    return [frozenset(found[name]) for name in classes]


def _numbers(values: Sequence[str], kind: type, what: str) -> list:
    found = []
    for line, text in enumerate(values, 2):
        try:
            found.append(kind(text))
        except ValueError:
            raise DataError(f"{what} must be a number, not {text!r} (line {line})") from None
    return found


def _bucketed(values: Sequence, bucket: Callable, path: pathlib.Path) -> list[str]:
    found = []
    for line, value in enumerate(values, 2):
        try:
            found.append(bucket(value))
        except ValueError as error:
            raise DataError(f"{path} line {line}: {error}; correct it") from None
    return found


def _several(text: str, path: pathlib.Path) -> frozenset[str]:
    if not text.startswith("["):
        return frozenset(x.strip() for x in text.split("|"))
    try:
        return frozenset(map(str, ast.literal_eval(text)))
    except (ValueError, SyntaxError) as error:
        raise DataError(f"{path}: {text} must be a list such as ['a', 'b']") from error
