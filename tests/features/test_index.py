"""The guard: what may change when a run goes on, and what may not."""

import json

import jax
import numpy as np
import pytest

from dinov2_jax.convert import write_model
from dinov2_jax.features.index import (
    check_same,
    differences,
    format_index,
    names_sha256,
)
from dinov2_jax.model import Model, load
from tests.convert.models import make_params
from tests.evals.stand_ins import ListSource


def test_differences_are_named():
    old = {"what": "cls", "norm": True, "model": {"depth": 3, "name": "a"}, "rows": [3]}
    new = {"what": "cls,mean", "norm": True, "model": {"depth": 4, "name": "b"}, "shard_size": 9}
    assert differences(old, new) == [
        "model.depth: 3 -> 4",
        "shard_size: (absent) -> 9",
        "what: 'cls' -> 'cls,mean'",
    ]
    assert differences(old, old | {"rows": [1], "bad_images": 2}) == []
    with pytest.raises(ValueError, match=r"out holds .*: norm: True -> False; set that back"):
        check_same("out", old, old | {"norm": False})


def test_long_values_are_cut():
    (line,) = differences({"label_names": ["a"] * 99}, {"label_names": ["b"] * 99})
    assert len(line) < 150


def test_the_index_is_json_with_a_fact_a_line():
    index = {"what": "cls", "model": {"depth": 3}, "rows": [1, 2]}
    text = format_index(index)
    assert json.loads(text) == index
    assert len(text.splitlines()) == len(index) + 2


def source(names):
    return ListSource([None] * len(names), names)


def test_names_tell_whether_images_came_went_or_moved():
    names = [f"{i:05d}" for i in range(5000)]
    found = names_sha256(source(names))
    assert found == names_sha256(source(list(names)))
    for changed in (names[:-1], ["new", *names], names[:2500] + names[2501:], names[::-1]):
        assert names_sha256(source(changed)) != found
    # A few hundred are looked at, however many there are.
    reads = []
    counted = source(names)
    counted.name = lambda i: reads.append(i) or names[i]
    names_sha256(counted)
    assert len(reads) == len(set(reads)) == 256 and {0, 4999} <= set(reads)


def test_one_weight_changes_the_hash_and_the_format_does_not(model, tmp_path):
    found = model.weights_sha256
    write_model(tmp_path / "again", model.spec, make_params(model.spec), format="orbax")
    assert load(tmp_path / "again").weights_sha256 == found
    params = jax.tree.map(np.array, model.params)
    params["norm"]["bias"][3] += 1e-6
    assert Model(model.spec, params).weights_sha256 != found
