"""Our checkpoints, as the trainer's own class writes them."""

import jax
import numpy as np
import pytest

from dinov2_jax.checkpoints import Checkpoints, KeepPolicy
from dinov2_jax.convert import read_model
from dinov2_jax.convert.orbax_dir import read_orbax
from dinov2_jax.convert.read import read_source
from tests.convert.models import assert_same, make_params, make_spec


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with steps 9 and 10, and the trees of the last."""
    workdir = tmp_path_factory.mktemp("run")
    spec = make_spec("registers")
    params = make_params(spec, heads=("dino_head",))
    trees = {"teacher": params, "student": jax.tree.map(lambda x: x + 1, params)}
    with Checkpoints(workdir / "checkpoints", KeepPolicy(last=3)) as checkpoints:
        for step in (9, 10):
            scaled = jax.tree.map(lambda x, step=step: x * np.float32(step), trees)
            state = {**scaled, "step": np.int32(step), "opt_state": {"mu": params}}
            checkpoints.save(step, jax.tree.map(jax.numpy.asarray, state), {"books": 1})
    (workdir / "model.json").write_text(spec.to_json())
    return workdir, spec, trees


def scaled(tree, factor):
    return jax.tree.map(lambda x: x * np.float32(factor), tree)


@pytest.mark.parametrize("tree", ["teacher", "student"])
def test_workdir(run, tree):
    workdir, spec, trees = run
    read_spec, params = read_model(workdir, tree=tree, with_heads=True)
    assert read_spec == spec
    assert_same(params, scaled(trees[tree], 10))
    assert read_source(workdir, tree=tree).format == f"Orbax, {tree} of step 10"
    assert_same(read_model(workdir, tree=tree)[1], scaled(trees[tree]["backbone"], 10))


def test_one_step(run):
    workdir, spec, trees = run
    read_spec, params = read_model(workdir / "checkpoints" / "9", with_heads=True)
    assert read_spec == spec
    assert_same(params, scaled(trees["teacher"], 9))


def test_only_the_tree_is_read(run):
    params, metadata, what = read_orbax(run[0])
    assert params.keys() == {"backbone", "dino_head"}
    assert isinstance(params["backbone"]["cls_token"], np.ndarray)
    assert metadata.keys() == {"dinov2_jax.model"} and what == "teacher of step 10"
    with pytest.raises(ValueError, match=r"tree='ema' must be one of \('teacher', 'student'\)"):
        read_orbax(run[0], tree="ema")
