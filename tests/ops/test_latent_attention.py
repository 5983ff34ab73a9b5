"""Attention over the paged cache of latents: absorbed against expanded, pages against rows, and what is not read."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.ops import latent_attention as ops
from r1jax.ops.latent_attention import (
    Coded,
    PagedLatents,
    bytes_a_token,
    empty_pages,
    latent_attention,
    latent_attention_reference,
    write_latents,
)
from r1jax.ops.quantize import dequantize, quantize

HEADS, NOPE, ROPE, VALUE, RANK = 3, 6, 4, 5, 7
LONGEST = 13  # columns of every table, so that few programs are compiled


@jax.jit
def attend(*arguments):
    return latent_attention(*arguments, scale=0.3)


def table_of(counts, pages, rng):
    """Pages of each row, in a random order."""
    order, table = rng.permutation(pages), np.zeros((len(counts), LONGEST), np.int32)
    for row, count in enumerate(counts):
        table[row, :count], order = order[:count], order[count:]
    return jnp.asarray(table)


def problem(lengths, queries, page, seed=0):
    """A filled cache (garbage where nothing was written) and the queries that follow it."""
    rng = np.random.default_rng(seed)
    counts = [-(-length // page) for length in lengths]

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    cache = PagedLatents(1e3 * normal(40, page, RANK + ROPE), table_of(counts, 40, rng))
    entries = normal(len(lengths), 17, RANK + ROPE)
    places = jnp.broadcast_to(jnp.arange(17)[None], entries.shape[:2])
    cache = write_latents(cache, entries, places, places < jnp.asarray(lengths)[:, None])
    positions = jnp.asarray(lengths)[:, None] - queries + jnp.arange(queries)[None]
    q_nope, q_rope = normal(len(lengths), queries, HEADS, NOPE), normal(len(lengths), queries, HEADS, ROPE)
    kv_b = normal(HEADS * (NOPE + VALUE), RANK) / RANK**0.5
    return (q_nope, q_rope, kv_b, cache, positions, jnp.ones(positions.shape, bool)), np.asarray(entries)


def softmax64(q_nope, q_rope, kv_b, entries):
    """One query over its keys, expanded, in float64."""
    out = []
    for head, w in enumerate(np.float64(kv_b).reshape(HEADS, NOPE + VALUE, RANK)):
        keys = entries[:, :RANK] @ w[:NOPE].T
        scores = 0.3 * (keys @ q_nope[head] + entries[:, RANK:] @ q_rope[head])
        weights = np.exp(scores - scores.max())
        out.append(weights / weights.sum() @ (entries[:, :RANK] @ w[NOPE:].T))
    return np.stack(out)


@pytest.mark.once
@pytest.mark.parametrize("step", [4, 8, 1024])
@pytest.mark.parametrize("queries", [1, 2])
def test_absorbed_equals_expanded(monkeypatch, queries, step):
    monkeypatch.setattr(ops, "TOKENS_A_STEP", step)
    arguments, entries = problem([9, 2, 17, 4], queries, page=4)
    fast = latent_attention(*arguments, scale=0.3)
    np.testing.assert_allclose(fast, latent_attention_reference(*arguments, scale=0.3), rtol=0, atol=1e-5)
    q_nope, q_rope, kv_b, _, positions, _ = arguments
    for row, t in np.ndindex(4, queries):
        seen = np.float64(entries[row, : int(positions[row, t]) + 1])
        want = softmax64(np.float64(q_nope[row, t]), np.float64(q_rope[row, t]), kv_b, seen)
        np.testing.assert_allclose(fast[row, t], want, rtol=0, atol=1e-5)


@pytest.mark.once
@given(
    lengths=st.lists(st.integers(2, 13), min_size=3, max_size=3), page=st.sampled_from([1, 4]), seed=st.integers(0, 99)
)
@hypothesis.settings(max_examples=15)
def test_rows_of_any_length_share_a_pool(lengths, page, seed):
    arguments, _ = problem(lengths, 2, page, seed)
    together = attend(*arguments)
    for row in range(3):
        q_nope, q_rope, kv_b, cache, positions, valid = arguments
        one = slice(row, row + 1)
        alone = cache._replace(table=cache.table[one])
        result = attend(q_nope[one], q_rope[one], kv_b, alone, positions[one], valid[one])
        np.testing.assert_allclose(together[one], result, rtol=0, atol=2e-6)


def test_pages_beyond_the_longest_living_row_are_not_read(monkeypatch):
    monkeypatch.setattr(ops, "TOKENS_A_STEP", 4)
    (q_nope, q_rope, kv_b, cache, positions, valid), _ = problem([4, 12, 3], 1, page=4)
    valid = valid.at[1].set(False)  # the long row has ended
    unread = cache.table[1, 1:]
    poisoned = cache._replace(pages=cache.pages.at[unread].set(jnp.nan))
    run = jax.jit(lambda cache: latent_attention(q_nope, q_rope, kv_b, cache, positions, valid, scale=0.3))
    assert np.isfinite(run(poisoned)).all()
    np.testing.assert_array_equal(run(poisoned)[::2], run(cache)[::2])


def test_a_batch_of_ended_rows_gives_zeros():
    (*inputs, valid), _ = problem([4, 2], 1, page=4)
    assert not np.any(latent_attention(*inputs, jnp.zeros_like(valid), scale=0.3))


def test_writing_touches_valid_tokens_only():
    cache = PagedLatents(jnp.zeros((3, 2, 5)), jnp.asarray([[2, 0], [1, 0]]))
    entries = 1 + jnp.arange(20.0).reshape(2, 2, 5)
    positions, valid = jnp.asarray([[1, 2], [0, 7]]), jnp.asarray([[True, True], [True, False]])
    pages = np.array(write_latents(cache, entries, positions, valid).pages)
    np.testing.assert_array_equal(pages[2, 1], entries[0, 0])
    np.testing.assert_array_equal(pages[0, 0], entries[0, 1])
    np.testing.assert_array_equal(pages[1, 0], entries[1, 0])
    assert np.count_nonzero(pages) == 15


def test_bfloat16_stays_near_fp32():
    arguments, _ = problem([9, 17], 2, page=4)
    want = latent_attention(*arguments, scale=0.3)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, arguments)
    result = latent_attention(*half, scale=0.3)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(result.astype(jnp.float32), want, rtol=0, atol=0.05)


def coded(cache, kind):
    """The same pool with its latents in codes."""
    pages = cache.pages
    return cache._replace(pages=Coded(quantize(pages[..., :RANK], kind), pages[..., RANK:]))


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.02), ("fp8", 0.1)])
@pytest.mark.parametrize("step", [4, 1024])
def test_codes_are_attended_to_as_what_they_stand_for(monkeypatch, kind, bound, step):
    monkeypatch.setattr(ops, "TOKENS_A_STEP", step)
    (q_nope, q_rope, kv_b, cache, *rest), _ = problem([9, 2, 17, 4], 2, page=4)
    arguments = (q_nope, q_rope, kv_b, coded(cache, kind), *rest)
    found = latent_attention(*arguments, scale=0.3)
    np.testing.assert_allclose(found, latent_attention_reference(*arguments, scale=0.3), rtol=0, atol=1e-5)
    exact = latent_attention(q_nope, q_rope, kv_b, cache, *rest, scale=0.3)
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < bound


@pytest.mark.parametrize("balanced", [False, True])
def test_codes_of_the_weight_join_queries_and_outputs(balanced):
    (q_nope, q_rope, kv_b, *rest), _ = problem([9, 2, 17, 4], 2, page=4)
    codes = quantize(kv_b, "int8", scale_dtype=jnp.bfloat16)
    if balanced:
        codes = codes._replace(balance=2.0 ** (jnp.arange(RANK) % 3 - 1).astype(jnp.bfloat16)[None])
    found = latent_attention(q_nope, q_rope, codes, *rest, scale=0.3)
    want = latent_attention(q_nope, q_rope, dequantize(codes), *rest, scale=0.3)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


def test_codes_in_bfloat16_stay_near_fp32():
    (q_nope, q_rope, kv_b, cache, *rest), _ = problem([9, 17], 2, page=4)
    codes = quantize(kv_b, "int8", scale_dtype=jnp.bfloat16)
    arguments = (q_nope, q_rope, codes, coded(cache, "int8"), *rest)
    want = latent_attention(*arguments, scale=0.3)
    half, turned = q_nope.astype(jnp.bfloat16), q_rope.astype(jnp.bfloat16)
    pages = coded(cache, "int8").pages
    pages = pages._replace(rope=pages.rope.astype(jnp.bfloat16))
    result = latent_attention(half, turned, codes, cache._replace(pages=pages), *rest, scale=0.3)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(result.astype(jnp.float32), want, rtol=0, atol=0.05)


@pytest.mark.parametrize(("kind", "taken"), [("float", 4 * (RANK + ROPE)), ("int8", RANK + 4 + 4 * ROPE)])
def test_tokens_are_written_as_the_pool_holds_them(kind, taken):
    entries, table = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, RANK + ROPE)), jnp.float32), [[1], [0]]
    empty = PagedLatents(empty_pages(kind, 2, 4, RANK, ROPE, jnp.float32), jnp.asarray(table))
    places = jnp.broadcast_to(jnp.arange(3)[None], (2, 3))
    pages = write_latents(empty, entries, places, places < jnp.asarray([[3], [2]])).pages
    assert bytes_a_token(pages) == taken
    rows = pages if kind == "float" else jnp.concatenate([dequantize(pages.latent), pages.rope], axis=-1)
    np.testing.assert_allclose(rows[1, :3], entries[0], rtol=0, atol=0 if kind == "float" else 0.02)
    np.testing.assert_allclose(rows[0, :2], entries[1, :2], rtol=0, atol=0 if kind == "float" else 0.02)
    assert not np.any(rows[0, 2:]) and not np.any(rows[1, 3:])
