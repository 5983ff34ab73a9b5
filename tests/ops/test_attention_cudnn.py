"""What surrounds cuDNN's attention, with the reference in cuDNN's place: order of tokens, lengths, trial, fallback."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.ops import attention, attention_cudnn
from r1jax.ops.attention import dot_product_attention, dot_product_attention_reference

LENGTH = 129


def stand_in(q, k, v, scale, causal, lengths):
    """cuDNN's meaning of lengths, and its right to leave anything behind them; odd ones JAX refuses."""
    if q.shape[1] % 2 or k.shape[1] % 2:
        raise NotImplementedError(f"Unsupported sequence length Q {q.shape[1]}, KV {k.shape[1]}.")
    if lengths is None:
        return dot_product_attention_reference(q, k, v, scale=scale, causal=causal)
    of_queries, of_keys = lengths
    valid = jnp.arange(k.shape[1])[None] < of_keys[:, None]
    out = dot_product_attention_reference(q, k, v, scale=scale, causal=causal, valid=valid)
    return jnp.where(jnp.arange(q.shape[1])[None, :, None, None] < of_queries[:, None, None, None], out, jnp.nan)


@pytest.fixture
def tried(monkeypatch):
    """A GPU as far as attention can tell; the calls of cuDNN in an opened trial."""
    calls = []

    def call(*arguments):
        calls.append(arguments[0].shape)
        return stand_in(*arguments)

    monkeypatch.setattr(attention, "target", lambda: types.SimpleNamespace(platform="gpu"))
    monkeypatch.setattr(attention_cudnn, "_cudnn", call)
    attention._cudnn_agrees.cache_clear()
    yield calls
    attention._cudnn_agrees.cache_clear()


def draw(dtype=jnp.float32, length=LENGTH, width=16):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((3, length, 2, w)), dtype) for w in (width, width, 8)]


def mask(name):
    rng = np.random.default_rng(1)
    valid = np.ones((3, LENGTH), bool)
    if name == "holes":
        valid = rng.random((3, LENGTH)) < 0.7
    if name == "behind":
        valid = np.arange(LENGTH) < np.array([[LENGTH], [1], [77]])
    if name == "a whole case":
        valid[1] = False
    return jnp.asarray(valid)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["all", "holes", "behind", "a whole case"])
def test_order_and_lengths_equal_a_mask_in_value_and_gradient(monkeypatch, name, causal):
    monkeypatch.setattr(attention_cudnn, "_cudnn", stand_in)
    valid = mask(name)
    exists = valid & jnp.any(valid, axis=1, keepdims=True)
    read = exists if causal else jnp.broadcast_to(jnp.any(valid, axis=1, keepdims=True), valid.shape)

    @jax.jit
    def both(q, k, v):
        results = []
        for way in (attention_cudnn.fused_attention, dot_product_attention_reference):
            out, back = jax.vjp(lambda *x, f=way: f(*x, scale=0.3, causal=causal, valid=valid), q, k, v)
            seen = read[:, :, None, None]
            results.append((jnp.where(seen, out, 0), *back(jnp.where(seen, jnp.cos(3 * out), 0))))
        return results

    for fast, slow in zip(*both(*draw()), strict=True):
        np.testing.assert_allclose(fast, slow, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("queries", "keys", "causal"), [(129, 129, True), (131, 130, False), (130, 133, False)])
def test_odd_lengths_without_a_mask_equal_the_reference(monkeypatch, queries, keys, causal):
    monkeypatch.setattr(attention_cudnn, "_cudnn", stand_in)
    q, (_, k, v) = draw(length=queries)[0], draw(length=keys)

    @jax.jit
    def both(q, k, v):
        results = []
        for way in (attention_cudnn.fused_attention, dot_product_attention_reference):
            out, back = jax.vjp(lambda *x, f=way: f(*x, scale=0.3, causal=causal, valid=None), q, k, v)
            results.append((out, *back(jnp.cos(3 * out))))
        return results

    for fast, slow in zip(*both(q, k, v), strict=True):
        np.testing.assert_allclose(fast, slow, rtol=0, atol=2e-6)


@pytest.mark.parametrize("masked", [True, False])
def test_is_tried_once_and_then_used_inside_loops_and_checkpoints(tried, masked):
    arrays = draw(jnp.bfloat16)
    valid = mask("holes") if masked else None

    def loss(*arrays):
        @jax.checkpoint
        def layer(q, _):
            return q + dot_product_attention(q, *arrays[1:], scale=0.3, causal=True, valid=valid).mean(-1)[
                ..., None
            ], ()

        return jnp.sum(jax.lax.scan(layer, arrays[0], length=2)[0].astype(jnp.float32))

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arrays)
    assert np.isfinite(value) and all(np.isfinite(np.asarray(g, np.float32)).all() for g in gradients)
    trials = [shape for shape in tried if shape[0] == 2]
    assert len(tried) > len(trials) and {shape[0] for shape in tried} == {2, 3}
    before = len(trials)
    jax.jit(loss)(*[x + 1 for x in arrays])
    assert len([shape for shape in tried if shape[0] == 2]) == before


@pytest.mark.parametrize("fault", ["wrong", "refused"])
def test_falls_back_with_a_warning_said_once(tried, monkeypatch, fault):
    def broken(q, k, v, scale, causal, lengths):
        if fault == "refused":
            raise NotImplementedError("not on this card")
        return stand_in(q, k, v, 2 * scale, causal, lengths)

    monkeypatch.setattr(attention_cudnn, "_cudnn", broken)
    arrays = draw(jnp.bfloat16)
    run = jax.jit(lambda *x: dot_product_attention(*x, scale=0.3, causal=True))
    with pytest.warns(UserWarning, match="not on this card" if fault == "refused" else "differ from the reference"):
        out = run(*arrays)
    assert jnp.array_equal(out, dot_product_attention_reference(*arrays, scale=0.3, causal=True))
    jax.jit(lambda *x: dot_product_attention(*x, scale=0.4, causal=True))(*arrays)  # warnings are errors


@pytest.mark.parametrize(
    "arrays", [draw(), draw(jnp.bfloat16, length=127), draw(jnp.bfloat16, width=12), draw(jnp.bfloat16, width=264)]
)
def test_leaves_alone_what_cudnn_does_not_take_or_gains_nothing_by(tried, arrays):
    dot_product_attention(*arrays, scale=0.3, causal=True)
    assert not tried
