"""Tokenizers of checkpoints: their own file, bytes without one, and streams that keep characters whole."""

import functools
import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from r1jax.data.chat import BEGIN, END, Message
from r1jax.data.text import TextStream, Tokenizer, load_tokenizer
from r1jax.data.tokenizer import BOS, OFFSET
from r1jax.errors import UserError

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
CHINESE = "右肺上叶见一枚 8 mm 实性结节 😀 done"


@functools.cache
def byte_pairs():
    """A byte-level BPE like DeepSeek's, with its marks as added tokens."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    library.train_from_iterator([CHINESE, "the cat sat on the mat"], trainer)
    library.add_special_tokens([BEGIN, END])
    library.add_tokens(["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"])
    return library


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    byte_pairs().save(str(path / "tokenizer.json"))
    told = {"add_bos_token": True, "bos_token": {"content": BEGIN}}
    (path / "tokenizer_config.json").write_text(json.dumps(told), "utf-8")
    return path


def test_own_file_is_used(folder):
    tokenizer, library = load_tokenizer(folder), byte_pairs()
    begin = library.token_to_id(BEGIN)
    assert tokenizer.encode("the cat") == [begin, *library.encode("the cat").ids]
    assert tokenizer.encode(BEGIN + "the") == [begin, *library.encode("the").ids]
    assert tokenizer.decode(tokenizer.encode(CHINESE)) == CHINESE
    assert tokenizer.size == library.get_vocab_size()


def test_chat_marks_are_single_tokens(folder):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode_chat([Message("user", "the cat")])
    pieces = [tokenizer.library.id_to_token(i) for i in ids]
    assert pieces[:2] == [BEGIN, "<｜User｜>"] and pieces[-3:-1] == ["<｜Assistant｜>", "<think>"]
    assert tokenizer.decode(ids) == "<｜User｜>the cat<｜Assistant｜><think>\n"


def test_bytes_without_a_file(tmp_path):
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("ab") == [BOS, ord("a") + OFFSET, ord("b") + OFFSET]
    assert tokenizer.decode(tokenizer.encode(CHINESE)) == CHINESE
    assert tokenizer.encode("") == [BOS]
    text = tokenizer.decode(tokenizer.encode_chat([Message("user", "hm")]))
    assert text == "<｜User｜>hm<｜Assistant｜><think>\n"


def test_damaged_files_are_named(tmp_path, folder):
    (tmp_path / "tokenizer.json").write_text('{"model": 3}', "utf-8")
    with pytest.raises(UserError, match="is no tokenizer of the tokenizers library"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert load_tokenizer(tmp_path).first == byte_pairs().token_to_id(BEGIN)
    (tmp_path / "tokenizer_config.json").write_text("[]", "utf-8")
    with pytest.raises(UserError, match="is no JSON object"):
        load_tokenizer(tmp_path)


def test_chat_needs_deepseeks_marks():
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(UserError, match="has no token <｜begin▁of▁sentence｜>"):
        Tokenizer(library, None).encode_chat([Message("user", "a")])


def check_stream(tokenizer, ids, size):
    stream, pieces = TextStream(tokenizer), []
    for start in range(0, len(ids), size):
        pieces.append(stream.push(ids[start : start + size]))
        assert not pieces[-1].endswith("\ufffd")
    return [*pieces, stream.close()]


@given(TEXTS, st.integers(1, 3), st.sampled_from(["bytes", "pairs"]))
def test_streamed_text_is_the_text(text, size, kind):
    tokenizer = Tokenizer(None, None) if kind == "bytes" else Tokenizer(byte_pairs(), None)
    ids = tokenizer.encode(text)
    pieces = check_stream(tokenizer, ids, size)
    assert "".join(pieces) == tokenizer.decode(ids)  # the text, but for special tokens spelled out in it
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 270), max_size=60), st.integers(1, 3))
def test_streamed_garbage_is_what_decoding_gives(ids, size):
    tokenizer = Tokenizer(None, None)
    assert "".join(check_stream(tokenizer, ids, size)) == tokenizer.decode(ids)
