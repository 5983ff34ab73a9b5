"""The byte-level tokenizer is lossless and pads as the model expects."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.data.tokenizer import BOS, EOS, OFFSET, PAD, VOCAB_SIZE, decode, encode, encode_batch

TEXTS = st.text(st.characters(exclude_categories=("Cs",)))  # every character but lone surrogates


@given(TEXTS)
def test_round_trip(text):
    tokens = encode(text)
    assert decode(tokens) == text
    assert tokens[0] == BOS and tokens[-1] == EOS
    assert len(tokens) == len(text.encode("utf-8")) + 2
    assert all(OFFSET <= t < VOCAB_SIZE for t in tokens[1:-1])


@pytest.mark.parametrize("text", ["右肺上叶见一枚 8 mm 实性结节,边缘毛刺。", "Nodule: 8 mm\n\tspiculated", "𝛼😀", ""])
def test_round_trip_of_other_scripts(text):
    assert decode(encode(text)) == text


def test_special_tokens_are_skipped_and_cut_characters_replaced():
    tokens = encode("肺")
    assert decode([PAD, PAD, *tokens, PAD]) == "肺"
    assert decode([*tokens[:3]]) == "\ufffd"
    assert decode([VOCAB_SIZE, VOCAB_SIZE + 4, *encode("a")]) == "a"  # a vocabulary padded for alignment


@given(st.lists(TEXTS, min_size=1, max_size=5), st.integers(1, 24))
def test_batches_are_cut_and_padded(texts, length):
    tokens, valid = encode_batch(texts, length)
    assert tokens.shape == valid.shape == (len(texts), length) and tokens.dtype == np.int32
    for row, text in enumerate(texts):
        expected = encode(text)[:length] if text else []
        assert tokens[row][valid[row]].tolist() == expected
        assert valid[row].tolist() == [i < len(expected) for i in range(length)]
        assert (tokens[row][~valid[row]] == PAD).all()
