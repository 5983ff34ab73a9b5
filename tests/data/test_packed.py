"""Packed text: nothing lost, nothing twice, documents kept apart; against the plain stream of tokens."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.data.packed import PackedText, synthetic_text
from r1jax.data.source import Source
from r1jax.data.tokenizer import BOS, EOS, decode, encode
from r1jax.data.vocabulary import open_vocabulary

BYTES = open_vocabulary(None)


@settings(max_examples=40)
@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=12), st.integers(2, 9))
def test_every_token_is_predicted_exactly_once(documents, length):
    source = PackedText("texts", documents, BYTES, length)
    raw = source.read_batch(np.arange(len(source)))
    stream = [token for text in documents for token in encode(text)]
    targets = [int(t) for row, ok in zip(raw["text"], raw["text_valid"], strict=True) for t in row[1:][ok[1:]]]
    assert targets == stream[1:]
    assert [int(row[0]) for row in raw["text"]] == stream[: -1 : length - 1][: len(source)]
    assert raw["text_valid"][:-1].all() and raw["text_valid"][-1].any()
    assert decode(stream[:1] + targets) == "".join(documents)


@settings(max_examples=40)
@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=12), st.integers(2, 9))
def test_bytes_of_all_sequences_are_those_of_the_text(documents, length):
    source = PackedText("texts", documents, BYTES, length)
    total = source.read_batch(np.arange(len(source)))["bytes"].sum()
    np.testing.assert_allclose(total, sum(len(text.encode()) for text in documents), rtol=1e-5)


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12), st.sets(st.sampled_from("abcdef")), st.integers(2, 9)
)
def test_sequences_that_hold_known_documents_are_counted(documents, known, length):
    texts = [letter * (1 + ord(letter) % 5) for letter in documents]
    source = PackedText("texts", texts, BYTES, length)
    other = PackedText("known", [letter * (1 + ord(letter) % 5) for letter in sorted(known)] or ["z"], BYTES, 4)
    marks = [
        place > 0 and letter in known
        for letter, text in zip(documents, texts, strict=True)
        for place in range(len(text) + 2)
    ]
    windows = [marks[1 + i * (length - 1) : 1 + (i + 1) * (length - 1)] for i in range(len(source))]
    assert source.holding(other) == sum(any(window) for window in windows)


def test_reading_order_does_not_matter():
    source = PackedText("texts", ["one", "two", "drei 四"] * 5, BYTES, 6)
    assert isinstance(source, Source)
    whole = source.read_batch(np.arange(len(source)))
    for i in (3, 0, len(source) - 1):
        one = source.read_batch(np.array([i]))
        assert one["case_id"] == [whole["case_id"][i]]
        for name in ("text", "text_valid", "bytes"):
            np.testing.assert_array_equal(one[name][0], whole[name][i])


def test_fingerprint_follows_content_and_length():
    make = lambda texts, length=8: PackedText("texts", texts, BYTES, length).fingerprint  # noqa: E731
    same, *others = make(["ab", "c"]), make(["a", "bc"]), make(["ab", "d"]), make(["ab", "c"], 9)
    assert same == make(iter(["ab", "c"])) and len({same, *others}) == 4


def test_synthetic_text_has_the_size_asked_for_and_knows_its_entropy():
    source = synthetic_text(0, 50, "train", BYTES, 16)
    assert 50 <= len(source) <= 60 and source.tokens[0] == BOS and source.tokens[-1] == EOS
    large = synthetic_text(0, 800, "train", BYTES, 16)
    assert large.tokens[: len(source.tokens)].tolist() == source.tokens.tolist()
    assert 0.4 < large.entropy < 0.6 and large.bytes_per_target < 1
    parts = [
        synthetic_text(seed, 8, part, BYTES, 16).fingerprint for seed in (0, 1) for part in ("train", "val", "test")
    ]
    assert len(set(parts)) == 6
