"""Hashed n-grams of tokens are those that plain Python finds in the text."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.data.tokenizer import encode_batch
from r1jax.ops.ngrams import hashed_ngrams, ngrams_of

TEXTS = (
    "Operating profit rose to EUR 13.1 mn from EUR 8.7 mn .",
    "a b, c--d  e\tF'g",
    "Umsätze stiegen; 利润 上升 !",
    "x",
    " . ",
    "",
)


def found(texts, buckets, length=96):
    tokens, valid = encode_batch(texts, length)
    ids, exist = jax.jit(hashed_ngrams, static_argnums=2)(jnp.asarray(tokens), jnp.asarray(valid), buckets)
    return [Counter(row[here].tolist()) for row, here in zip(np.asarray(ids), np.asarray(exist), strict=True)]


def test_they_are_those_of_plain_python():
    for text, counted in zip(TEXTS, found(TEXTS, 2**20), strict=True):
        assert counted == ngrams_of(text, 2**20), text


def test_case_and_digits_do_not_count_but_words_and_their_order_do():
    one, same, other, turned = found(("Rose 13 %", "rose 87 %", "rose 138 %", "13 rose %"), 2**20)
    assert one == same and one != other and one != turned
    assert sum((one - turned).values()) == 1  # the pair alone


def test_padding_adds_nothing():
    texts = ("net loss widened", "flat")
    assert found(texts, 1000, 24) == found(texts, 1000, 96)
