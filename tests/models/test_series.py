"""The encoder of streams: piecewise-linear features, padding that leaves no trace, one dependence a stream."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import SeriesConfig
from r1jax.models.series import SeriesEncoder, piecewise_linear

CONFIG, WIDTH = SeriesConfig(layers=1, bins=4, tokens=2, num_attention_heads=2), 8


@pytest.fixture(scope="module")
def encoder():
    """The compiled encoder of two streams of five events, its parameters and inputs."""
    module, rng = SeriesEncoder(CONFIG, WIDTH), np.random.default_rng(0)
    numbers = jnp.asarray(rng.uniform(-3, 3, (3, 2, 5, 3)), jnp.float32)
    states = jnp.asarray(rng.integers(0, 3, (3, 2, 5)), jnp.int32)
    valid = jnp.asarray(np.arange(5)[None, None] >= np.array([[0, 3], [2, 2], [4, 0]])[..., None])
    inputs = (numbers, states, valid)
    params = jax.jit(lambda: module.init(jax.random.key(0), *inputs))()["params"]
    return jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs)), params, inputs


def test_piecewise_linear_features_fill_one_piece_after_another():
    x = jnp.asarray([[-4.0], [-3.0], [-2.25], [0.0], [2.0], [7.0]])
    want = [
        [-4, 0, 0, 0, 0],
        [-3, 0, 0, 0, 0],
        [-2.25, 0.5, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [2, 1, 1, 1, 1 / 3],
        [7, 1, 1, 1, 1],
    ]
    np.testing.assert_allclose(piecewise_linear(x, 4), want, atol=1e-6)


def test_a_stream_becomes_its_tokens_and_a_summary(encoder):
    apply, params, inputs = encoder
    tokens, summary = apply(params, *inputs)
    assert tokens.shape == (3, 2 * (CONFIG.tokens + 1), WIDTH) and summary.shape == (3, WIDTH)


def test_what_is_padding_leaves_no_trace(encoder):
    apply, params, (numbers, states, valid) = encoder
    noise = jnp.where(valid[..., None], numbers, 1e3)
    other = jnp.where(valid, states, 2)
    for a, b in zip(apply(params, numbers, states, valid), apply(params, noise, other, valid), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_label_and_a_number_of_each_event_count(encoder):
    apply, params, (numbers, states, valid) = encoder
    before = apply(params, numbers, states, valid)[1]
    for changed in (
        (numbers, states.at[:, 0, 3].set((states[:, 0, 3] + 1) % 3), valid),
        (numbers.at[:, 1, 4, 0].add(1.0), states, valid),
    ):
        moved = np.abs(np.asarray(apply(params, *changed)[1] - before)).max(axis=1)
        seen = np.asarray(valid[:, 0, 3]) if changed[0] is numbers else np.ones(3, bool)
        np.testing.assert_array_equal(moved > 1e-4, seen)


def test_streams_have_tokens_of_their_own(encoder):
    apply, params, (numbers, states, valid) = encoder
    tokens = apply(params, numbers, states, valid)[0]
    moved = apply(params, numbers.at[:, 1].add(0.5), states, valid)[0]
    np.testing.assert_array_equal(moved[:, :3], tokens[:, :3])
    assert np.abs(np.asarray(moved - tokens))[:, 3:].max(axis=(1, 2)).min() > 1e-3


def test_gradients_are_finite_and_reach_every_weight(encoder):
    apply, params, inputs = encoder
    gradients = jax.jit(jax.grad(lambda p: sum(jnp.sum(jnp.sin(x)) for x in apply(p, *inputs))))(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all() and np.abs(np.asarray(gradient)).max() > 0, path
