"""Further test sets: which class is which, who counts, and errors that name the cure."""

import json

import numpy as np
import pytest

from dinov2_jax.data.records import DataError
from dinov2_jax.evals.further_sets import (
    FurtherSet,
    check_sets,
    judge_corruptions,
    judge_images,
    judge_label_sets,
    parse_set,
    parse_sets,
    training_classes,
)
from dinov2_jax.evals.scores import ALEXNET_ERROR
from dinov2_jax.features.read import FeatureSet
from tests.evals.conftest import write_images

TRAIN = ("ape", "bee", "cat", "dog")


def make_features(paths, labels=None, names=(), *, images=None) -> FeatureSet:
    return FeatureSet(
        arrays={},
        ids=np.arange(len(paths)),
        paths=list(paths),
        labels=None if labels is None else np.array(labels, np.int32),
        label_names=tuple(names),
        index={"images": images or len(paths)},
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("v2=/data/v2", FurtherSet("v2", "/data/v2", "images")),
        ("real=/data/real.json:label_sets", FurtherSet("real", "/data/real.json", "label_sets")),
        ("x=hf:name:test", FurtherSet("x", "hf:name:test", "images")),
        ("x=hf:name:test:images", FurtherSet("x", "hf:name:test", "images")),
    ],
)
def test_parse(text, expected):
    assert parse_set(text) == expected


def test_parse_errors():
    for text in ("v2", "=x", "v2=", "a/b=x"):
        with pytest.raises(ValueError, match="must be NAME=PATH or NAME=PATH:KIND"):
            parse_set(text)
    assert parse_sets(["a=x", "b=hf:c:d", "c=/e"], ["a=../f.txt"], data="/data") == [
        FurtherSet("a", "/data/x", "images", "/data/../f.txt"),
        FurtherSet("b", "hf:c:d", "images"),
        FurtherSet("c", "/e", "images"),
    ]
    for sets, classes in ((["a=x", "a=y"], []), (["a=x"], ["b=f"]), (["a=x"], ["a"])):
        with pytest.raises(ValueError, match="--test must name each set once"):
            parse_sets(sets, classes, data="/data")


def test_only_images_may_be_at_a_url():
    (found,) = parse_sets(["v2=v2"], [], data="gs://bucket/data")
    assert found.path == "gs://bucket/data/v2"
    for sets, classes in (
        (["c=c:corruptions"], []),
        (["real=r.json:label_sets"], []),
        (["v2=/v2"], ["v2=a.txt"]),
    ):
        with pytest.raises(ValueError, match=r"gs://bucket/data/\S+ must be on a disk: of --test"):
            parse_sets(sets, classes, data="gs://bucket/data")


def test_classes_by_name_and_by_file(tmp_path):
    found = training_classes(("bee", "dog"), of=TRAIN, at="the set")
    np.testing.assert_array_equal(found, [1, 3])
    file = tmp_path / "classes.txt"
    file.write_text("n01\tcat\nn02\t0\n\nbee\n")
    found = training_classes(("bee", "n01", "n02", "n03"), of=TRAIN, at="the set", file=str(file))
    np.testing.assert_array_equal(found, [1, 2, 0, -1])


def test_class_errors(tmp_path):
    with pytest.raises(
        ValueError, match=r"classes \['cow'\] of v2 are not among the 4 .*--classes"
    ):
        training_classes(("bee", "cow"), of=TRAIN, at="v2")
    file = tmp_path / "classes.txt"
    file.write_text("a\tbee\nb\t1\n")
    with pytest.raises(ValueError, match="each its own class of training"):
        training_classes(("a", "b"), of=TRAIN, at="v2", file=str(file))
    with pytest.raises(ValueError, match="one or more"):
        training_classes(("c",), of=TRAIN, at="v2", file=str(file))


def test_other_classes_cannot_be_predicted():
    """As the reference's index-select of logits: `ape` scores best and is not in the set."""
    features = make_features("abc", [1, 0, 1], ("bee", "dog"))
    logits = np.array([[9, 1, 0, 2], [9, 3, 0, 2], [9, 3, 0, 2.0]])
    found = judge_images(features, lambda _: logits, of=TRAIN, at="v2", file=None)
    assert found.metrics["top1"] == pytest.approx(200 / 3) and found.metrics["top5"] == 100
    assert found.counts == {"images": 3, "classes": 2}


def test_labels_out_of_range():
    features = make_features("abc", [1, -1, 0], ("bee", "dog"))
    with pytest.raises(ValueError, match="1 of 3 labels of v2 are none, such as -1"):
        judge_images(features, lambda _: np.zeros((3, 4)), of=TRAIN, at="v2", file=None)


def test_images_of_classes_left_out_do_not_count(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("dog\n")
    features = make_features("abc", [1, 0, 1], ("bee", "dog"))
    found = judge_images(features, lambda _: np.zeros((3, 4)), of=TRAIN, at="v2", file=str(file))
    assert found.counts == {"images": 2, "classes": 1} and found.metrics["top1"] == 100
    with pytest.raises(ValueError, match="v2 must have labels"):
        judge_images(make_features("a"), lambda _: None, of=TRAIN, at="v2", file=None)


def test_label_sets_in_the_order_of_file_names(tmp_path):
    """ReaL's list is in the order of the official validation images, whatever folder holds them."""
    features = make_features(["x/val_2.jpg", "y/val_1.jpg", "x/val_3.jpg"])
    logits = np.eye(4)[[1, 2, 0]]  # of val_2, val_1, val_3
    (tmp_path / "real.json").write_text(json.dumps([[2, 3], [0], []]))
    found = judge_label_sets(
        features, lambda _: logits, path=str(tmp_path / "real.json"), num_classes=4
    )
    assert found.metrics == {"top1": 50.0} and found.counts == {"images": 2}
    (tmp_path / "real.json").write_text(
        json.dumps({"val_1.jpg": [2], "val_2.jpg": [1], "val_3.jpg": [3]})
    )
    found = judge_label_sets(
        features, lambda _: logits, path=str(tmp_path / "real.json"), num_classes=4
    )
    assert found.metrics == {"top1": pytest.approx(200 / 3)}


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("[[0]]", 2, "has 1 lists and the tested split 2 images"),
        ("[[0], [1], [0]]", 3, "3 images, 2 of them readable"),
        ('{"a.jpg": [0]}', 2, r"must have a list, empty or not, for each image; not \['b.jpg'\]"),
        ('{"a.jpg": [0], "b.jpg": [9]}', 2, r"has classes \[9\]; they must be numbers below 4"),
        ("{", 2, "must be JSON .*expected: "),
        ("3", 2, "must hold lists of class numbers; expected: images"),
        ('{"a.jpg": 0, "b.jpg": 1}', 2, "must hold lists of class numbers"),
        ('[["a"], [0]]', 2, "must hold lists of class numbers"),
    ],
)
def test_label_set_errors(tmp_path, text, images, message):
    (tmp_path / "real.json").write_text(text)
    features = make_features(["a.jpg", "b.jpg"], images=images)
    with pytest.raises(ValueError, match=message):
        judge_label_sets(features, lambda _: None, path=str(tmp_path / "real.json"), num_classes=4)


@pytest.mark.parametrize(
    ("name", "kind", "classes", "message"),
    [
        ("real.json", "label_sets", None, r"new: .*real.json is not there; expected: images"),
        ("c", "corruptions", None, r"new: .*c is not there; expected: images"),
        ("few.json", "label_sets", None, "has 1 lists and the tested split 2 images"),
        ("fog", "corruptions", None, r"corruptions \['green', 'red'\] ; expected: images"),
        ("v2", "images", None, "nothing found at .*v2"),
        ("fog", "images", "list.txt", r"new: .*list.txt is not there"),
        ("fog", "images", None, r"classes \['green'\] of new are not among the 2 of training"),
    ],
)
def test_sets_are_checked_before_any_work(tmp_path, name, kind, classes, message):
    (tmp_path / "few.json").write_text("[[0]]")
    write_images(tmp_path / "fog", count=1, seed=0, classes=("red", "green"))
    wrong = FurtherSet("new", str(tmp_path / name), kind, classes and str(tmp_path / classes))
    with pytest.raises(DataError, match=message):
        check_sets([wrong], make_features(["a.jpg", "b.jpg"]), of=("ape", "red"), alexnet={})


def corruptions(root, names, severities=range(1, 6)):
    for name in names:
        for severity in severities:
            (root / name / str(severity)).mkdir(parents=True)
    return str(root)


def test_mce_is_of_the_standard_fifteen(tmp_path):
    path = corruptions(tmp_path, [*ALEXNET_ERROR, "spatter"])
    seen = []

    def judge(folder, at):
        seen.append(at)
        return 0.8 if "spatter" in folder else 0.1 * int(folder[-1])

    found = judge_corruptions(path, judge, alexnet=ALEXNET_ERROR | {"spatter": 0.4})
    expected = {name: 0.3 / error for name, error in ALEXNET_ERROR.items()}
    assert found.metrics["mce"] == pytest.approx(100 * np.mean(list(expected.values())))
    of_all = [*expected.values(), 0.8 / 0.4]
    assert found.metrics["mce_of_16"] == pytest.approx(100 * np.mean(of_all))
    assert list(found.headline) == ["mce"] and len(seen) == 16 * 5 and "fog 3" in seen


def test_fewer_corruptions_are_named_so(tmp_path):
    path = corruptions(tmp_path, ["fog", "snow"], severities=(2, 10))
    found = judge_corruptions(path, lambda folder, _: 0.1 * int(folder.rpartition("/")[2]))
    expected = np.mean([0.6 / ALEXNET_ERROR["fog"], 0.6 / ALEXNET_ERROR["snow"]])
    assert found.metrics == {"mce_of_2": pytest.approx(100 * expected)}
    assert found.details["error_by_severity"]["fog"] == pytest.approx([0.2, 1.0])


def test_fewer_severities_are_not_the_papers_number(tmp_path):
    """AlexNet's errors are means over five: those of the mildest alone would look like a record."""
    path = corruptions(tmp_path, ALEXNET_ERROR, severities=(1,))
    found = judge_corruptions(path, lambda *_: 0.3)
    assert list(found.metrics) == list(found.headline) == ["mce_of_15"]


def test_corruption_errors(tmp_path):
    path = corruptions(tmp_path, ["fog", "rain"])
    with pytest.raises(ValueError, match=r"\['rain'\] have no AlexNet error, see --alexnet-errors"):
        judge_corruptions(path, lambda *_: 0.0)
    (tmp_path / "rain" / "1").rename(tmp_path / "other")
    with pytest.raises(ValueError, match=r"\['other'\].*expected: images"):
        judge_corruptions(path, lambda *_: 0.0)
