"""The scores of a text's n-grams: their sum, their dropout, and their place in the model."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from r1jax.data.tokenizer import encode_batch
from r1jax.models.ngrams import RARITY, NgramScores
from r1jax.models.r1 import R1, Inputs
from r1jax.ops.ngrams import PIECES, hashed_ngrams, ngrams_of
from tests.models.test_r1 import CONFIG

TEXTS = ("profit rose", "Profit fell , fell 3 %", "")
BUCKETS = 512


def make(length=24):
    tokens, valid = map(jnp.asarray, encode_batch(TEXTS, length))
    module = NgramScores(BUCKETS, 5, dropout=0.5)
    rng = np.random.default_rng(0)
    params = {
        "embed_tokens": jnp.asarray(rng.standard_normal((BUCKETS, 5)), jnp.float32),
        RARITY: jnp.asarray(rng.integers(0, 3, BUCKETS), jnp.float32),
    }
    return jax.jit(lambda tokens, valid: module.apply({"params": params}, tokens, valid)), params, tokens, valid


def test_it_sums_what_pieces_and_words_say_each_with_weights_of_norm_1():
    apply, params, tokens, valid = make()
    found = apply(tokens, valid)
    said, rarity = (np.asarray(params[name], float) for name in ("embed_tokens", RARITY))
    for row, text in enumerate(TEXTS):
        ids, exist = map(np.asarray, hashed_ngrams(tokens[row : row + 1], valid[row : row + 1], BUCKETS))
        expected = np.zeros(5)
        for kinds in (slice(0, len(PIECES)), slice(len(PIECES), None)):
            once = np.unique(ids[..., kinds][exist[..., kinds]])
            weight = rarity[once] / max(np.linalg.norm(rarity[once]), 1e-3)
            expected += weight @ said[once] / 2**0.5
        np.testing.assert_allclose(found[row], expected, atol=1e-5)
        assert bool(text) == bool(np.any(expected))
    assert max(ngrams_of(TEXTS[1], BUCKETS).values()) > 1
    longer, more = make(40)[2:]
    np.testing.assert_allclose(apply(longer, more), found, atol=1e-5)


def test_it_is_exported_for_any_number_of_texts():
    apply, _, tokens, valid = make()
    (count,) = export.symbolic_shape("b")
    shape = (count, tokens.shape[1])
    program = export.export(apply)(jax.ShapeDtypeStruct(shape, tokens.dtype), jax.ShapeDtypeStruct(shape, bool))
    np.testing.assert_allclose(program.call(tokens[:2], valid[:2]), apply(tokens, valid)[:2], rtol=1e-5, atol=1e-5)


def test_dropout_leaves_whole_ngrams_out():
    _, params, tokens, valid = make()
    params = params | {"embed_tokens": jnp.ones((BUCKETS, 5))}
    module = NgramScores(BUCKETS, 5, dropout=0.5)

    @jax.jit
    def drawn(key):
        cases, rngs = (None, None) if key is None else (jnp.arange(len(TEXTS)), {"dropout": key})
        return module.apply({"params": params}, tokens, valid, cases=cases, rngs=rngs)

    whole, one, two = (np.asarray(drawn(key)) for key in (None, jax.random.key(0), jax.random.key(1)))
    assert np.abs(one - two)[:2].max() > 1e-3
    for some in (one, two):  # all numbers of an n-gram stay or go together, so that the direction remains
        np.testing.assert_allclose(some[0] / some[0, 0], whole[0] / whole[0, 0], rtol=1e-4)


def test_the_model_reads_them_where_the_config_has_buckets():
    config = replace(CONFIG, modalities=("text",), text_ngrams=BUCKETS, dropout=0.0)
    decoder = replace(
        config.decoder, vocab_size=264, num_hidden_layers=1, num_nextn_predict_layers=0, first_k_dense_replace=1
    )
    config = replace(config, decoder=decoder)
    tokens, valid = map(jnp.asarray, encode_batch(TEXTS[:2], 6))
    heads, inputs = (("class", 3), ("other", 2)), Inputs(text=tokens, text_valid=valid)
    model, rng = R1(config, heads), np.random.default_rng(0)

    def shapes(module):
        return jax.eval_shape(lambda: module.init(jax.random.key(0), inputs))["params"]

    assert set(shapes(model)) - set(shapes(R1(replace(config, text_ngrams=0), heads))) == {"ngrams"}
    params = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), jnp.float32), shapes(model))
    silent = params | {"ngrams": jax.tree.map(jnp.zeros_like, params["ngrams"])}
    apply = jax.jit(lambda params, valid: model.apply({"params": params}, inputs._replace(text_valid=valid)).heads)
    heard, unheard = apply(params, valid), apply(silent, valid)
    said = NgramScores(BUCKETS, 5).apply({"params": params["ngrams"]}, tokens, valid)
    assert np.abs(said).max() > 1e-2
    for name, part in {"class": said[:, :3], "other": said[:, 3:]}.items():
        np.testing.assert_allclose(heard[name] - unheard[name], part, atol=1e-4)
    nothing = jnp.zeros_like(valid)
    np.testing.assert_array_equal(apply(params, nothing)["class"], apply(silent, nothing)["class"])
    fresh = jax.jit(lambda: model.init(jax.random.key(0), inputs))()["params"]
    for part in apply(fresh, valid).values():  # no random opinion of the decoder, which n-grams would have to unlearn
        np.testing.assert_array_equal(part, 0)
