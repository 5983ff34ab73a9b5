"""The summary of a text: against a plain loop, blind to padding, and able to tell a wording from its denial."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.data import tokenizer
from r1jax.models.text import TextSummary, grouped

WIDTH, WINDOW = 6, 4


def make(length=9, merge=1):
    module = TextSummary(5, window=WINDOW, merge=merge)
    x = jax.random.normal(jax.random.key(1), (2, length, WIDTH))
    valid = jnp.arange(length)[None] < jnp.asarray([[length], [length - 3]])
    params = module.init(jax.random.key(0), x, valid)["params"]
    return params, jax.jit(lambda p, x, valid: module.apply({"params": p}, x, valid)), x, valid


@pytest.mark.parametrize("merge", [1, 3])
def test_equals_a_plain_loop_over_places(merge):
    params, apply, x, valid = make(merge=merge)
    out = apply(params, x, valid)

    def conv(rows, step, name):
        weight, bias = (np.asarray(params[name][k], float) for k in ("weight", "bias"))
        result = np.zeros_like(rows)
        for place in range(len(rows)):
            back = [place - step * (WINDOW - 1 - i) for i in range(WINDOW)]
            joined = np.concatenate([rows[b] if b >= 0 else np.zeros(WIDTH) for b in back])
            y = weight @ joined + bias
            result[place] = y / (1 + np.exp(-y))
        return result

    for case, length in enumerate(np.asarray(valid).sum(axis=1)):
        rows = np.asarray(x[case, :length], float)
        rows = rows / np.sqrt((rows**2).mean(axis=1, keepdims=True) + 1e-6)
        words = conv(rows, 1, "words")
        found = np.concatenate([words, conv(words, WINDOW // 2, "phrases")], axis=1)
        weight = np.asarray(params["summary"]["weight"], float)
        np.testing.assert_allclose(out.summary[case], weight @ found.max(axis=0), atol=1e-5)
        for group in range(length // merge if merge > 1 else 0):
            strongest = found[group * merge : (group + 1) * merge].max(axis=0)
            weight = np.asarray(params["tokens"]["weight"], float)
            np.testing.assert_allclose(out.tokens[case, group], weight @ strongest, atol=1e-5)
    assert (out.tokens is None) == (merge == 1)


@pytest.mark.parametrize("merge", [1, 8])
def test_gradients_are_finite_where_signs_tie_or_nothing_is_written(merge):
    """Of all places the strongest is asked, of those that are equal and of those that do not exist."""
    params, _, x, valid = make(length=16, merge=merge)
    module, same = TextSummary(5, window=WINDOW, merge=merge), jnp.ones_like(x)
    nothing, whole = jnp.zeros_like(valid), jnp.ones_like(valid)
    one = nothing.at[:, 0].set(True)
    mixed = jnp.concatenate([whole[:1], nothing[:1]])

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(params, x, valid):
        read = module.apply({"params": params}, x, valid)
        total = jnp.sum(jnp.where(jnp.any(valid, axis=1)[:, None], read.summary, 0) ** 2)  # as its caller hides it
        if read.tokens is None:
            return total
        there = jnp.any(grouped(valid, merge), axis=2)
        return total + jnp.sum(jnp.where(there[..., None], read.tokens, 0) ** 2)

    for read, there in ((same, whole), (jnp.zeros_like(x), whole), (x, one), (x, mixed), (same, nothing)):
        found = gradient(params, read, there)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
        np.testing.assert_array_equal(np.asarray(found[1])[~np.asarray(there)], 0)  # no byte, no gradient
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(found))  # a batch without text teaches nothing


def test_padding_leaves_no_trace():
    params, apply, x, valid = make()
    longer = jnp.concatenate([x, 5 * jnp.ones((2, 7, WIDTH))], axis=1)
    out = apply(params, longer, jnp.concatenate([valid, jnp.zeros((2, 7), bool)], axis=1))
    np.testing.assert_allclose(out.summary, apply(params, x, valid).summary, atol=1e-6)


def test_a_few_steps_tell_a_symptom_from_its_denial_in_both_languages():
    affirmed = ["Reports cough.", "Has fever and haemoptysis.", "有咯血。", "体检发现，痰中带血。"]
    denied = ["Denies cough, fever.", "No haemoptysis.", "无咯血。", "体检发现，否认咯血。"]
    tokens, valid = tokenizer.encode_batch(affirmed + denied, 48)
    valid = jnp.asarray(valid)
    label = jnp.asarray([1.0] * 4 + [0.0] * 4)
    module = TextSummary(1)
    embedding = jax.random.normal(jax.random.key(2), (tokenizer.VOCAB_SIZE, 16))
    x = embedding[tokens]
    params = module.init(jax.random.key(0), x, valid)["params"]

    @jax.jit
    def step(params):
        def loss(p):
            logit = module.apply({"params": p}, x, valid).summary[:, 0]
            return jnp.mean(jnp.logaddexp(0, -(2 * label - 1) * logit))

        value, gradient = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.01 * jnp.sign(g), params, gradient), value

    for _ in range(60):
        params, value = step(params)
    assert value < 0.05
