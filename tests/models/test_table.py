"""The encoder of record fields: missing values, no NaN anywhere, periodic features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import TableConfig
from r1jax.models.table import TableEncoder

FIELDS, WIDTH = 3, 8


def make(layers):
    module = TableEncoder(TableConfig(layers=layers, frequencies=4, num_attention_heads=2), WIDTH)
    values = jnp.asarray([[0.3, -1.2, 2.0], [0.1, 0.4, -0.5]])
    params = jax.jit(lambda: module.init(jax.random.key(0), values))()["params"]
    apply = jax.jit(lambda params, values: module.apply({"params": params}, values)[0])
    return apply, params, values


def test_a_missing_field_is_its_embedding_whatever_else_is_known():
    apply, params, values = make(layers=0)
    missing = values.at[:, 1].set(jnp.nan)
    out, full = apply(params, missing), apply(params, values)
    np.testing.assert_array_equal(out[0, 1], out[1, 1])
    np.testing.assert_allclose(out[:, [0, 2]], full[:, [0, 2]], rtol=0, atol=1e-6)
    weight, row = np.asarray(params["projection"]["weight"], float), np.asarray(params["missing"][1], float)
    np.testing.assert_allclose(out[0, 1], weight @ (row / np.sqrt((row**2).mean() + 1e-6)), rtol=0, atol=1e-5)
    assert np.abs(np.asarray(apply(params, values.at[0, 1].set(0.0)) - out))[0, 1].max() > 1e-2  # missing is not zero


def test_known_values_become_periodic_features():
    apply, params, values = make(layers=0)
    weight, v = np.asarray(params["weight"], float), np.asarray(values, float)
    frequency = 0.1 * 2.0 ** np.arange(4)
    np.testing.assert_allclose(params["frequency"], np.tile(frequency, (FIELDS, 1)), rtol=1e-6)
    for case, field in np.ndindex(2, FIELDS):
        angle = 2 * np.pi * v[case, field] * frequency
        x = weight[field] @ np.array([v[case, field], *np.sin(angle), *np.cos(angle), 1.0])
        x = np.asarray(params["projection"]["weight"], float) @ (x / np.sqrt((x**2).mean() + 1e-6))
        np.testing.assert_allclose(apply(params, values)[case, field], x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("missing", [[], [0], [0, 1, 2]])
def test_no_nan_in_values_or_gradients(missing):
    apply, params, values = make(layers=1)
    for field in missing:
        values = values.at[0, field].set(jnp.nan)
    value, gradients = jax.jit(jax.value_and_grad(lambda p: jnp.sum(apply(p, values) ** 2)))(params)
    assert np.isfinite(value)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path
    taught = np.abs(np.asarray(gradients["missing"])).max(axis=1) > 0
    assert np.flatnonzero(taught).tolist() == missing


def test_the_summary_holds_the_plain_sum_of_fields_beside_what_the_layers_make_of_them():
    module = TableEncoder(TableConfig(layers=0, frequencies=4, num_attention_heads=2), WIDTH)
    values = jnp.asarray([[0.3, -1.2, 2.0]])
    params = module.init(jax.random.key(0), values)["params"]
    _, summary = module.apply({"params": params}, values)
    angle = 2 * np.pi * np.asarray(values, float)[0][:, None] * 0.1 * 2.0 ** np.arange(4)
    parts = np.concatenate([np.asarray(values, float).T, np.sin(angle), np.cos(angle), np.ones((FIELDS, 1))], axis=1)
    tokens = np.einsum("fi,foi->fo", parts, np.asarray(params["weight"], float))
    normed = tokens / np.sqrt((tokens**2).mean(axis=1, keepdims=True) + 1e-6)
    joined = np.concatenate([tokens.mean(axis=0), normed.mean(axis=0)])
    np.testing.assert_allclose(summary[0], np.asarray(params["summary"]["weight"], float) @ joined, atol=1e-4)


def test_on_a_gpu_both_means_of_the_fields_are_held_apart_from_being_joined():
    module, values = TableEncoder(TableConfig(layers=1, frequencies=4, num_attention_heads=2), WIDTH), jnp.zeros((2, 3))
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), values))
    program = jax.jit(module.apply).trace(params, values).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("optimization_barrier") == 1
