"""Attention against float64 NumPy, one query at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.ops import attention
from r1jax.ops.attention import dot_product_attention, dot_product_attention_reference


def attention64(q, k, v, scale, causal, valid):
    """Explicit loops over cases, heads and queries; a query that sees nothing gets the mean of all values."""
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, n in np.ndindex(*q.shape[:3]):
        seen = [s for s in range(k.shape[1]) if valid[b, s] and (s <= t or not causal)]
        seen = seen or list(range(k.shape[1]))
        scores = np.array([q[b, t, n].astype(float) @ k[b, s, n] * scale for s in seen])
        if not any(valid[b, s] and (s <= t or not causal) for s in seen):
            scores = np.zeros(len(seen))
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, seen, n].astype(float) / weights.sum()
    return out


def draw(queries=5, keys=5, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((2, queries, 3, 6), (2, keys, 3, 6), (2, keys, 3, 4))  # values narrower than keys, as in MLA
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("block", [5, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", ["none", "some", "a whole case"])
def test_equals_float64(monkeypatch, causal, masked, block):
    monkeypatch.setattr(attention, "SCORES", 2 * 3 * 5 * block)
    q, k, v = draw()
    valid = np.ones((2, 5), bool)
    if masked == "some":
        valid[0, [0, 3]], valid[1, 2:] = False, False  # with a causal mask, query 0 of case 0 sees nothing
    if masked == "a whole case":
        valid[1] = False
    given = None if masked == "none" else jnp.asarray(valid)
    out = dot_product_attention(*map(jnp.asarray, (q, k, v)), scale=0.7, causal=causal, valid=given)
    np.testing.assert_allclose(out, attention64(q, k, v, 0.7, causal, valid), rtol=0, atol=2e-6)


def test_more_keys_than_queries():
    q, k, v = draw(queries=2, keys=7)
    out = dot_product_attention(*map(jnp.asarray, (q, k, v)), scale=0.4, causal=False)
    np.testing.assert_allclose(out, attention64(q, k, v, 0.4, False, np.ones((2, 7), bool)), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_query_that_sees_nothing_keeps_everything_finite(dtype):
    arrays = [jnp.asarray(x, dtype) for x in draw()]
    valid = jnp.asarray([[False] * 5, [False, True, True, True, True]])

    def loss(*arrays):
        return jnp.sum(dot_product_attention(*arrays, scale=0.7, causal=True, valid=valid).astype(jnp.float32) ** 2)

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))(*arrays)
    assert np.isfinite(value)
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in gradients)
    assert not np.asarray(gradients[0], np.float32)[0].any()  # scores that are masked away pull on nothing


def test_gradient_equals_finite_differences_in_float64():
    q, k, v = draw(queries=4, keys=4)
    valid = np.array([[True, True, False, True], [True] * 4])
    step = np.random.default_rng(1).standard_normal(q.shape)

    def loss(q):
        return jnp.sum(jnp.sin(dot_product_attention(q, jnp.asarray(k), jnp.asarray(v), scale=0.7, causal=True,
                                                     valid=jnp.asarray(valid))))  # fmt: skip

    slope = np.sum(np.asarray(jax.grad(loss)(jnp.asarray(q)), float) * step)
    ends = [np.sin(attention64(q + h * step, k, v, 0.7, True, valid)).sum() for h in (1e-5, -1e-5)]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-5)


def test_softmax_and_sums_are_fp32_in_bf16():
    rng = np.random.default_rng(0)
    length = 2048
    q, k = (jnp.zeros((1, length, 1, 8), jnp.bfloat16) for _ in range(2))
    v = jnp.asarray(1 + rng.standard_normal((1, length, 1, 1)), jnp.bfloat16)
    out = dot_product_attention(q, k, v, scale=1.0, causal=False)
    assert out.dtype == jnp.bfloat16
    mean = np.asarray(v, np.float64).mean()
    np.testing.assert_allclose(np.asarray(out, np.float64), mean, rtol=2**-8)


def test_blocks_of_queries_give_the_values_and_gradients_of_all_at_once(monkeypatch):
    arrays = [jnp.asarray(x) for x in draw(queries=37, keys=37)]
    valid = jnp.asarray(np.arange(37) < np.array([[30], [37]]))

    def loss(function, *arrays):
        return jnp.sum(jnp.sin(3 * function(*arrays, scale=0.7, causal=True, valid=valid)))

    compare = jax.value_and_grad(loss, argnums=(1, 2, 3))
    expected = compare(dot_product_attention_reference, *arrays)
    monkeypatch.setattr(attention, "SCORES", 2 * 3 * 37 * 8)  # five blocks, the last one not full
    found = compare(dot_product_attention, *arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=5e-6), found, expected)


def test_memory_does_not_grow_with_the_square_of_the_length(monkeypatch):
    monkeypatch.setattr(attention, "SCORES", 2**16)

    def loss(q, k, v):
        return jnp.sum(dot_product_attention(q, k, v, scale=1.0, causal=True) ** 2)

    for run in (loss, jax.grad(loss, argnums=(0, 1, 2))):
        used = []
        for length in (512, 2048):
            shapes = [jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)] * 3
            used.append(jax.jit(run).lower(*shapes).compile().memory_analysis().temp_size_in_bytes)
        assert used[1] < 5 * used[0] < 4 * 2 * 2048**2
