"""Samplers against NumPy written out in loops, against Hugging Face's processors, and by their properties."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.arguments import GenerationSettings
from r1jax.serve.sampling import draw, keep_min_p, keep_top_k, keep_top_p, penalise_repetition, process_logits

ROWS, WORDS = 3, 17
seeds = st.integers(0, 10_000)


def logits_of(seed):
    return np.random.default_rng(seed).normal(0, 2, (ROWS, WORDS)).astype(np.float32)


def softmax(row):
    weights = np.exp(np.float64(row) - np.max(row))
    return weights / weights.sum()


def kept(logits):
    return np.isfinite(np.asarray(logits))


@given(seed=seeds, k=st.integers(1, WORDS + 3))
@hypothesis.settings(max_examples=20)
def test_top_k_keeps_the_k_highest(seed, k):
    logits = logits_of(seed)
    result = np.asarray(keep_top_k(jnp.asarray(logits), k))
    for row in range(ROWS):
        best = set(sorted(range(WORDS), key=lambda token: -logits[row, token])[:k])
        assert set(np.flatnonzero(kept(result[row]))) == best
    np.testing.assert_array_equal(result[kept(result)], logits[kept(result)])


def test_top_k_keeps_ties():
    assert kept(keep_top_k(jnp.asarray([[1.0, 3.0, 3.0, 0.0]]), 1)).tolist() == [[False, True, True, False]]


@given(seed=seeds, p=st.floats(0.01, 0.99))
@hypothesis.settings(max_examples=20)
def test_top_p_keeps_the_fewest_that_reach_p(seed, p):
    logits = logits_of(seed)
    result = kept(keep_top_p(jnp.asarray(logits), p))
    for row in range(ROWS):
        probs, total, expected = softmax(logits[row]), 0.0, set()
        for token in sorted(range(WORDS), key=lambda token: -probs[token]):
            hypothesis.assume(abs(total - p) > 1e-6)
            if total < p:
                expected.add(token)
            total += probs[token]
        assert set(np.flatnonzero(result[row])) == expected


@given(seed=seeds, p=st.floats(0.0, 0.99))
@hypothesis.settings(max_examples=20)
def test_min_p_is_a_share_of_the_most_probable(seed, p):
    logits = logits_of(seed)
    result = kept(keep_min_p(jnp.asarray(logits), p))
    for row in range(ROWS):
        probs = softmax(logits[row])
        hypothesis.assume(np.abs(probs - p * probs.max()).min() > 1e-6)
        np.testing.assert_array_equal(result[row], probs >= p * probs.max())


@given(seed=seeds)
@hypothesis.settings(max_examples=5)
def test_neutral_settings_change_nothing(seed):
    logits = jnp.asarray(logits_of(seed))
    seen = jnp.ones(logits.shape, bool)
    for result in (
        keep_top_p(logits, 1.0),
        keep_min_p(logits, 0.0),
        keep_top_k(logits, WORDS),
        penalise_repetition(logits, seen, 1.0),
        process_logits(logits, None, GenerationSettings(temperature=1.0)),
        process_logits(logits, None, GenerationSettings(temperature=0.0, top_k=1, min_p=0.5)),
    ):
        np.testing.assert_array_equal(result, logits)


@given(
    seed=seeds,
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(0, WORDS),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.9),
    penalty=st.floats(0.5, 2.0),
)
@hypothesis.settings(max_examples=20)
def test_what_is_left_is_a_distribution(seed, temperature, top_k, top_p, min_p, penalty):
    settings = GenerationSettings(16, temperature, top_k, top_p, min_p, penalty)
    seen = jnp.asarray(np.random.default_rng(seed).random((ROWS, WORDS)) < 0.3)
    result = process_logits(jnp.asarray(logits_of(seed)), seen, settings)
    probs = np.asarray(jax.nn.softmax(result, axis=-1))
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-5)
    support = kept(result).sum(-1)
    assert (support >= 1).all() and (support <= (settings.top_k or WORDS)).all()


def test_penalty_moves_both_signs_down():
    logits, seen = jnp.asarray([[2.0, -2.0, 2.0]]), jnp.asarray([[True, True, False]])
    np.testing.assert_allclose(penalise_repetition(logits, seen, 2.0), [[1.0, -4.0, 2.0]])


@pytest.mark.parametrize("seed", range(4))
def test_order_and_numbers_are_hugging_faces(seed):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    settings = GenerationSettings(temperature=0.7, top_k=9, top_p=0.8, min_p=0.1, repetition_penalty=1.3)
    logits = logits_of(seed)
    held = np.random.default_rng(seed).integers(0, WORDS, (ROWS, 5))
    scores = torch.tensor(logits)
    for processor in (
        transformers.RepetitionPenaltyLogitsProcessor(1.3),
        transformers.TemperatureLogitsWarper(0.7),
        transformers.TopKLogitsWarper(9),
        transformers.TopPLogitsWarper(0.8),
        transformers.MinPLogitsWarper(0.1),
    ):
        scores = processor(torch.tensor(held), scores)
    seen = np.zeros((ROWS, WORDS), bool)
    np.put_along_axis(seen, held, True, axis=1)
    result = process_logits(jnp.asarray(logits), jnp.asarray(seen), settings)
    np.testing.assert_allclose(result, scores.numpy(), rtol=1e-6)


def test_draws_follow_the_distribution():
    probs = np.array([0.5, 0.3, 0.2, 0.0])
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probs, jnp.float32))[None], (4000, 4))
    rows, steps = jnp.arange(4000) % 40, jnp.arange(4000) // 40
    tokens = np.asarray(jax.jit(draw)(logits, jax.random.key(0), rows, steps))
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / 4000, probs, atol=0.03)


def test_a_draw_knows_its_row_and_step_only():
    logits = jnp.asarray(np.tile(logits_of(0)[:1], (3, 1)) / 4)
    key, rows, steps = jax.random.key(1), jnp.asarray([5, 2, 9]), jnp.asarray([0, 7, 1])
    together = draw(logits, key, rows, steps)
    order = jnp.asarray([2, 0, 1])
    np.testing.assert_array_equal(draw(logits, key, rows[order], steps[order]), together[order])
    np.testing.assert_array_equal(draw(logits[:1], key, rows[1:2], steps[1:2]), together[1:2])
    many = draw(jnp.tile(logits[:1], (64, 1)), key, jnp.arange(64), jnp.zeros(64, jnp.int32))
    later = draw(jnp.tile(logits[:1], (64, 1)), key, jnp.arange(64), jnp.ones(64, jnp.int32))
    assert len(set(np.asarray(many).tolist())) > 3 and (many != later).any()
