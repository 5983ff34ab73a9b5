"""The n-gram summary of a text: its sum, silent at first and where nothing was learned, and blind to padding."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.config import ModelConfig
from r1jax.data.tokenizer import encode_batch
from r1jax.models.ngrams import RANK, NgramSummary
from r1jax.models.r1 import R1, Inputs
from r1jax.ops.ngrams import ngrams_of
from tests.models.test_r1 import CONFIG

TEXTS = ("profit rose", "Profit fell 3 %", "")
BUCKETS = 512


def make(length=24):
    tokens, valid = map(jnp.asarray, encode_batch(TEXTS, length))
    module = NgramSummary(BUCKETS, 5, dropout=0.5)
    return module, module.init(jax.random.key(0), tokens, valid)["params"], tokens, valid


def test_it_sums_what_the_buckets_say_over_the_root_of_their_number():
    module, params, tokens, valid = make()
    assert not np.asarray(module.apply({"params": params}, tokens, valid)).any()
    table = jax.random.normal(jax.random.key(1), (BUCKETS, RANK))
    params = params | {"embed_tokens": table}
    found = module.apply({"params": params}, tokens, valid)
    for row, text in enumerate(TEXTS):
        counted = ngrams_of(text, BUCKETS)
        total = sum((n * np.asarray(table[i], float) for i, n in counted.items()), np.zeros(RANK))
        expected = np.asarray(params["summary"]["weight"]) @ total / max(sum(counted.values()), 1) ** 0.5
        np.testing.assert_allclose(found[row], expected, atol=1e-5)
    longer, more = make(40)[2:]
    np.testing.assert_allclose(module.apply({"params": params}, longer, more), found, atol=1e-6)


def test_dropout_leaves_whole_ngrams_out():
    module, params, tokens, valid = make()
    params = params | {"embed_tokens": jnp.ones((BUCKETS, RANK))}
    drawn = [
        module.apply({"params": params}, tokens, valid, cases=jnp.arange(3), rngs={"dropout": jax.random.key(i)})
        for i in range(2)
    ]
    whole = np.asarray(module.apply({"params": params}, tokens, valid))
    assert np.abs(drawn[0] - drawn[1])[:2].max() > 1e-3
    for one in drawn:  # all numbers of an n-gram stay or go together, so that the direction remains
        np.testing.assert_allclose(one[0] / one[0, 0], whole[0] / whole[0, 0], rtol=1e-4)


def test_the_model_reads_them_where_the_config_has_buckets():
    config: ModelConfig = replace(CONFIG, modalities=("text",), text_ngrams=BUCKETS, dropout=0.0)
    config = replace(config, decoder=replace(config.decoder, vocab_size=264, num_nextn_predict_layers=0))
    tokens, valid = map(jnp.asarray, encode_batch(TEXTS[:2], 6))
    inputs, model = Inputs(text=tokens, text_valid=valid), R1(config, (("class", 3),))
    params = model.init(jax.random.key(0), inputs)["params"]
    without = R1(replace(config, text_ngrams=0), (("class", 3),)).init(jax.random.key(0), inputs)["params"]
    assert set(params) - set(without) == {"ngrams"}
    learned = params["ngrams"] | {"embed_tokens": jnp.ones((BUCKETS, RANK))}
    before = model.apply({"params": params}, inputs).heads["class"]
    after = model.apply({"params": params | {"ngrams": learned}}, inputs).heads["class"]
    assert np.abs(before - after).max() > 1e-3
    hidden = inputs._replace(text_valid=jnp.zeros_like(valid))
    for tree in (params, params | {"ngrams": learned}):
        seen = model.apply({"params": tree}, hidden).heads["class"]
        np.testing.assert_array_equal(seen, model.apply({"params": params}, hidden).heads["class"])
