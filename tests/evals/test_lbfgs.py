"""Minima that are known, each problem by its own steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinov2_jax.evals.lbfgs import begin, minimize


def quadratic(matrices, centers):
    def value_and_gradient(x):
        away = x - centers
        pull = jnp.einsum("kij,kj->ki", matrices, away)
        return (away * pull).sum(axis=-1) / 2 + 1, pull

    return value_and_gradient


def test_quadratics_of_very_different_condition():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        turn = np.linalg.qr(rng.standard_normal((5, 5)))[0]
        spectra = [np.ones(5), np.logspace(0, 4, 5), np.logspace(-2, 1, 5)]
        matrices = jnp.asarray([turn * s @ turn.T for s in spectra])
        centers = jnp.asarray(rng.standard_normal((3, 5)))
        start = jnp.zeros((3, 5))
        found = minimize(
            quadratic(matrices, centers),
            begin(start, memory=4),
            max_iterations=200,
            tolerance=1e-10,
        )
    np.testing.assert_allclose(found.x, centers, atol=1e-7)
    np.testing.assert_allclose(found.point.value, 1, atol=1e-12)
    assert (np.asarray(found.gradient) <= 1e-10).all()
    # The round one needs a step or two, and does not wait for the others.
    assert found.iterations[0] <= 3 < found.iterations[1] < 200


def test_one_that_is_at_its_minimum_stays_there():
    matrices, centers = jnp.stack([jnp.eye(2)] * 2), jnp.array([[0.0, 0], [3, 4]])
    found = minimize(
        quadratic(matrices, centers), begin(jnp.zeros((2, 2))), max_iterations=50, tolerance=1e-6
    )
    np.testing.assert_array_equal(found.x[0], 0)
    np.testing.assert_allclose(found.x[1], [3, 4], rtol=1e-6)
    np.testing.assert_array_equal(found.iterations > 1, [False, True])


def test_it_goes_on_where_it_was():
    with jax.enable_x64(True):
        matrices = jnp.diag(jnp.logspace(0, 2, 6))[None]
        problem = quadratic(matrices, jnp.ones((1, 6)))
        start, settings = begin(jnp.zeros((1, 6)), memory=4), dict(tolerance=1e-9)
        whole = minimize(problem, start, max_iterations=200, **settings)
        parts = start
        for count in (7, 4, 200):
            parts = minimize(problem, parts, max_iterations=count, **settings)
    assert whole.is_done.all() and 11 < int(whole.iterations[0]) == int(parts.iterations[0])
    np.testing.assert_allclose(parts.x, whole.x, rtol=1e-12)


def test_the_number_of_iterations_is_bounded():
    matrices = jnp.diag(jnp.logspace(0, 5, 6))[None]
    found = minimize(
        quadratic(matrices, jnp.ones((1, 6))),
        begin(jnp.zeros((1, 6))),
        max_iterations=3,
        tolerance=0,
    )
    assert int(found.iterations[0]) == 3


def test_steps_that_are_too_long_are_halved():
    """The value is infinite beyond 1, and the slope sends the first step there."""

    def value_and_gradient(x):
        def value(x):
            return (-jnp.log1p(-x) - 40 * x).sum()

        values = jax.vmap(value)(x)
        return jnp.where(jnp.isnan(values), jnp.inf, values), jax.vmap(jax.grad(value))(x)

    found = minimize(
        value_and_gradient, begin(jnp.zeros((1, 1))), max_iterations=100, tolerance=1e-3
    )
    assert float(found.x[0, 0]) == pytest.approx(1 - 1 / 40, abs=1e-5)


def test_float32_ends_where_rounding_ends_it():
    matrices, centers = jnp.eye(3)[None] * 1e4, jnp.array([[0.1, 0.2, 0.3]])
    found = minimize(
        quadratic(matrices, centers), begin(jnp.ones((1, 3))), max_iterations=500, tolerance=0
    )
    assert int(found.iterations[0]) < 100
    np.testing.assert_allclose(found.x, centers, rtol=1e-5)
