"""Presets name flags that XLA has; the cache lies where the user expects it."""

import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from dinov2_jax import compiler
from dinov2_jax.config_rules import CHOICES
from dinov2_jax.cost.topology import open_topology
from dinov2_jax.sharding import make_mesh
from tests import tiny


def test_the_configuration_knows_every_preset():
    assert CHOICES["compiler_preset"] == ("auto", *compiler.PRESETS)


def test_auto_is_the_flags_that_this_release_has(monkeypatch):
    assert compiler.compiler_options("auto", platform="cpu") == compiler.PRESETS["cpu_products"]
    assert compiler.compiler_options("auto", platform="tpu") == {}
    for flags in (
        {"xla_cpu_no_such_flag": True},
        {next(iter(compiler.PRESETS["cpu_products"])): "?"},
    ):
        compiler._is_known.cache_clear()
        monkeypatch.setitem(compiler.PRESETS, "cpu_products", flags)
        assert compiler.compiler_options("auto", platform="cpu") == {}
    compiler._is_known.cache_clear()


def test_products_on_cpu_are_those_without_the_preset():
    """The default on CPU: an experimental library makes the products of values and gradients."""
    if compiler.choose_preset("auto", platform="cpu") != "cpu_products":
        pytest.skip("this release of XLA does not know the flag of cpu_products")
    model = tiny.make_network().backbone
    images = np.random.default_rng(0).standard_normal((4, *tiny.IMAGE_SHAPE), np.float32)
    params = jax.jit(model.init)(jax.random.key(0), images)

    def loss(params, images):
        return jnp.sum(model.apply(params, images).cls ** 3)

    results, programs = [], []
    for preset in ("", "cpu_products"):
        options = compiler.compiler_options(preset, platform="cpu")
        run = jax.jit(jax.value_and_grad(loss), compiler_options=options)
        run = run.lower(params, images).compile()
        results.append(jax.tree.leaves(run(params, images)))
        programs.append(run.as_text())
    assert programs[0] != programs[1]  # the flag does something
    for right, ours in zip(*results, strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-5 * np.abs(right).max())


def test_flags_of_gpus_exist():
    # XLA knows them on every platform, and refuses a name that it does not know.
    lowered = jax.jit(lambda x: x + 1).lower(jnp.zeros(1))
    options = compiler.compiler_options("gpu_overlap", platform="cuda")
    np.testing.assert_array_equal(lowered.compile(compiler_options=options)(jnp.zeros(1)), 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered.compile(compiler_options={"xla_gpu_no_such_flag": True})


@pytest.mark.usefixtures("libtpu")
def test_flags_of_tpus_exist():
    device = open_topology("v5e:2x2").devices[0]
    x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=SingleDeviceSharding(device))
    options = compiler.compiler_options("tpu_overlap", platform=device.platform)
    jax.jit(lambda x: x + 1, compiler_options=options).lower(x).compile()


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(("chip", "by_default"), [("v5e", True), ("v6e", False)])
def test_collectives_run_beside_computation(chip, by_default):
    """Gathering the weights of a scan's turns; v5e compiles to the same program with the preset."""
    mesh = make_mesh(fsdp=4, devices=open_topology(f"{chip}:2x2").devices)

    def place(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))

    def loss(weights, x):
        def step(x, w):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, P())), None

        return jax.lax.scan(step, x, weights)[0].astype(jnp.float32).sum()

    weights, x = place((4, 1024, 1024), None, "fsdp"), place((16384, 1024), ("data", "fsdp"))
    programs = []
    for preset in ("", "tpu_overlap"):
        options = compiler.compiler_options(preset, platform="tpu")
        with jax.set_mesh(mesh):
            lowered = jax.jit(loss, compiler_options=options).lower(weights, x)
        programs.append(lowered.compile().as_text())
    is_beside = ["async_collective" in program for program in programs]
    assert is_beside == [by_default, True]
    assert (programs[0] == programs[1]) == by_default


def test_errors():
    with pytest.raises(
        ValueError, match="compiler_preset='fast' must be one of: 'auto', '', 'cpu_pro"
    ):
        compiler.compiler_options("fast", platform="tpu")
    with pytest.raises(ValueError, match="'gpu_overlap' is not for tpu; for it there is: tpu_over"):
        compiler.compiler_options("gpu_overlap", platform="tpu")
    with pytest.raises(ValueError, match="'tpu_overlap' is not for cpu; for it there is: cpu_pr"):
        compiler.compiler_options("tpu_overlap", platform="cpu")


@pytest.mark.parametrize(
    ("variable", "option", "expected"),
    [
        (None, None, f"models/compiled/{platform.node()}"),  # beside the weights
        (None, "chosen", "chosen"),
        ("", None, None),  # off
        ("elsewhere", None, None),  # what jax itself has read already
    ],
)
def test_cache_folder(monkeypatch, variable, option, expected):
    monkeypatch.setenv("DINOV2_JAX_CACHE", "models")
    monkeypatch.delenv(compiler.CACHE_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(compiler.CACHE_VARIABLE, variable)
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", option)
        compiler.use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
