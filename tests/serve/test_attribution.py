"""Integrated gradients against closed forms, and the completeness that they promise."""

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.serve.attribution import integrated_gradients


def test_a_polynomial_is_attributed_as_in_its_closed_form():
    x, start = jnp.array([[1.0, 2.0], [3.0, -1.0]]), jnp.zeros((2, 2))
    found = integrated_gradients(lambda v: v[:, 0] * v[:, 1] + v[:, 0] ** 3, start, x, 100)
    # Along the straight way each factor of the product gets half of it.
    half = x[:, 0] * x[:, 1] / 2
    np.testing.assert_allclose(found.contributions, jnp.stack([half + x[:, 0] ** 3, half], axis=1), rtol=1e-4)
    np.testing.assert_allclose(found.residual, 0.0, atol=2e-3)
    np.testing.assert_allclose(found.output, [3.0, 24.0])


def test_contributions_of_several_inputs_add_up():
    keys = jax.random.split(jax.random.key(0), 4)
    inputs = {"a": jax.random.normal(keys[0], (5, 3)), "b": jax.random.normal(keys[1], (5, 2, 4))}
    baseline = jax.tree.map(lambda x: jnp.full_like(x, 0.3), inputs)
    w, v = jax.random.normal(keys[2], (3, 8)), jax.random.normal(keys[3], (8, 8))

    def output(x):
        hidden = jnp.tanh(x["a"] @ w + x["b"].reshape(5, 8) @ v)
        return jnp.sum(jnp.sin(hidden), axis=1)

    found = integrated_gradients(output, baseline, inputs, 200)
    np.testing.assert_allclose(found.residual, 0.0, atol=2e-3)
    np.testing.assert_allclose(found.output - found.baseline, output(inputs) - output(baseline), atol=1e-5)
    assert np.abs(found.contributions["a"]).min() > 0 and found.contributions["b"].shape == (5, 2, 4)
    coarse = integrated_gradients(output, baseline, inputs, 1)
    assert np.abs(coarse.residual).max() > 100 * np.abs(found.residual).max()  # the residual tells a bad sum


def test_what_is_missing_adds_nothing_and_breaks_nothing():
    x = jnp.array([[2.0, jnp.nan]])
    found = integrated_gradients(lambda v: jnp.sum(jnp.where(jnp.isnan(v), 7.0, v), axis=1), jnp.ones((1, 2)), x, 3)
    np.testing.assert_allclose(found.contributions, [[1.0, 0.0]], rtol=1e-6)
    np.testing.assert_allclose([found.baseline[0], found.output[0]], [8.0, 9.0])


def test_shifted_points_together_are_finer_steps():
    x, start = jnp.array([[1.0, 2.0]]), jnp.zeros((1, 2))

    def output(v):
        return jnp.sin(5 * v[:, 0]) * v[:, 1]

    parts = [integrated_gradients(output, start, x, 3, (i + 0.5) / 4).contributions for i in range(4)]
    fine = integrated_gradients(output, start, x, 12).contributions
    np.testing.assert_allclose(sum(parts) / 4, fine, rtol=1e-5)
