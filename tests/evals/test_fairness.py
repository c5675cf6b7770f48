"""Groups, rates and gaps by hand; the metadata's readers."""

import math

import numpy as np
import pytest

from dinov2_jax.data.records import DataError
from dinov2_jax.evals.fairness import (
    age_bucket,
    associated,
    describe_gap,
    gap,
    hits,
    income_bucket,
    rates_by_group,
    skin_bucket,
)
from dinov2_jax.evals.fairness_sets import read_meanings, read_people


def test_buckets_by_their_cuts():
    """exp(4.5) is 90.02 and exp(7.5) is 1,808.04 dollars."""
    incomes = [1, 27, 90, 91, 1808, 1809, 19_671, 1e9]
    expected = ["low"] * 3 + ["medium"] * 2 + ["high"] * 3
    assert [income_bucket(x) for x in incomes] == expected
    for bad in (0, -3, math.nan, math.inf):
        with pytest.raises(ValueError, match="must be a positive number"):
            income_bucket(bad)
    assert [skin_bucket(x) for x in (1, 3, 4, 6)] == ["lighter", "lighter", "darker", "darker"]
    with pytest.raises(ValueError, match="skin=7 must be between 1 and 6"):
        skin_bucket(7)
    ages = [17, 18, 29.9, 30, 45, 69, 70, 99]
    names = [None, *["age_18_30"] * 2, "age_30_45", *["age_45_70"] * 2, *["age_70_plus"] * 2]
    assert [age_bucket(x) for x in ages] == names


def test_hits_look_at_all_ranks_and_all_concepts():
    meanings = [frozenset(), frozenset(["stove"]), frozenset(["sofa", "bed"])]
    ranked = np.array([[0, 1], [0, 1], [2, 0]])
    concepts = [frozenset(["stove"]), frozenset(["bed"]), frozenset(["tap", "bed"])]
    np.testing.assert_array_equal(hits(ranked, meanings, concepts), [True, False, True])


def test_associations_need_probability():
    meanings = [frozenset(["human"]), frozenset(["crime", "human"]), frozenset()]
    ranked = np.array([[0, 1], [2, 1], [1, 2]])
    probabilities = np.array([[0.8, 0.1], [0.9, 0.09], [0.05, 0.04]])
    found = associated(ranked, probabilities, meanings)
    np.testing.assert_array_equal(found["human"], [True, False, False])
    np.testing.assert_array_equal(found["crime"], [True, False, False])
    assert not found["non_human"].any()
    assert associated(ranked, probabilities, meanings, least_probability=0.05)["crime"].all()


def test_households_count_once():
    values = [True, True, True, False, False]
    groups = ["a", "a", "a", "a", None]
    assert rates_by_group(values, groups) == {"a": 0.75}
    # Three hits of the first household, none of the second.
    assert rates_by_group(values, groups, households=["x", "x", "x", "y", "y"]) == {"a": 0.5}


def test_the_two_gaps_of_the_papers_table():
    """74.0 of Africa against 89.7 of Europe: 15.7 points, 17.5 per cent."""
    rates = {"africa": 0.740, "europe": 0.897, "asia": 0.816}
    found = gap(rates)
    assert (found.best, found.worst) == ("europe", "africa")
    assert found.points == pytest.approx(0.157) and found.relative == pytest.approx(0.175, abs=1e-4)
    line = describe_gap("region", rates)
    assert "gap of 15.7 points, which is 17.5 per cent of the best" in line
    assert gap({"a": 0.0, "b": 0.0})[2:] == (0, 0)


HITS = """imageRelPath,concept,income,region,place
a.jpg,stove,50,af,h1
b.jpg,"sofa|bed",500,Asia,h2
c.jpg,"['tap', 'sink']",5000,eu,h2
"""


def test_no_group_has_no_gap():
    with pytest.raises(ValueError, match="no image that can be read is in a group"):
        gap({})


def test_metadata(tmp_path):
    path = tmp_path / "metadata.csv"
    path.write_text(HITS)
    columns = {"image": "imageRelPath", "household": "place"}
    people = read_people(str(tmp_path), columns=columns, group_by=["place"])
    assert people == read_people(str(path), columns=columns, group_by=["place"])
    assert people.images == [str(tmp_path / x) for x in ("a.jpg", "b.jpg", "c.jpg")]
    assert people.concepts[1:] == [{"sofa", "bed"}, {"tap", "sink"}]
    assert people.groups["income"] == ["low", "medium", "high"]
    assert people.groups["region"] == ["africa", "asia", "europe"]
    assert people.groups["place"] == people.households == ["h1", "h2", "h2"]
    path.write_text("image,gender,skin,age\na.jpg,Female,5,31\nb.jpg,male,1,17\n")
    people = read_people(str(path), columns={})
    assert people.concepts is None and people.households is None
    assert people.groups["gender_skin"] == ["female_darker", "male_lighter"]
    assert people.groups["age"] == ["age_30_45", None]


@pytest.mark.parametrize(
    "text, columns, message",
    [
        ("concept\nx\n", {}, "has no column image"),
        (HITS, {"image": "path"}, "has no column path"),
        (HITS, {"picture": "imageRelPath"}, r"--columns \['picture'\] must be"),
        ("image,concept,income\na,b,much\n", {}, r"income must be a number, not 'much' \(line 2\)"),
        ("image,concept,income\na,,3\n", {}, "line 2: concept is empty"),
        ("image,concept\na,b\n", {}, "has no groups"),
        ("image,gender\na,b\n", {}, "has no column skin"),
        ("image,concept,income\n", {}, "names no image"),
        ("image,concept,income\na,b,-3\n", {}, "csv line 2: income=-3.0 must be a positive number"),
        ("image,gender,skin\na,male,2\nb,male,7\n", {}, "csv line 3: skin=7 must be between 1 and"),
        (
            "image,gender,skin,years\na,female,1,7\nb,male,5,17\n",
            {"age": "years"},
            r"images\.csv: column years puts no image in a group, .* at 18 years; .* remove the",
        ),
    ],
)
def test_metadata_that_is_wrong(tmp_path, text, columns, message):
    path = tmp_path / "images.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_people(str(path), columns=columns)


def test_meanings(tmp_path):
    path = tmp_path / "meanings.csv"
    path.write_text("oven,stove\noven,kitchen\n")
    found = read_meanings(str(path), ["oven", "cat"], are_associations=False)
    assert found == [{"stove", "kitchen"}, set()]
    assert read_meanings(None, ["oven"], are_associations=False) == [{"oven"}]
    path.write_text("face,Possibly-Human\n")
    assert read_meanings(str(path), ["face"], are_associations=True) == [{"possibly_human"}]
    path.write_text("face,angel\n")
    with pytest.raises(DataError, match="line 1: angel must be of"):
        read_meanings(str(path), ["face"], are_associations=True)
    with pytest.raises(DataError, match="line 1 must be 'class,meaning' with one of"):
        read_meanings(str(path), ["oven"], are_associations=False)
    with pytest.raises(DataError, match="associations need --meanings"):
        read_meanings(None, ["face"], are_associations=True)
