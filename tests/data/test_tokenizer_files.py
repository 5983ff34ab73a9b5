"""Tokenizer files: what is read and what is not, one rule for their special tokens, bytes as such a file."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from r1jax.data import tokenizer as byte_level
from r1jax.data import tokenizer_files
from r1jax.data.tokenizer_files import (
    BYTE_NAMES,
    byte_files,
    check_bytes,
    check_same,
    open_published,
    read_files,
)
from r1jax.data.vocabulary import open_vocabulary
from r1jax.errors import UserError


def write(folder, words, told=None, **change):
    """A tokenizer of whole words with given numbers."""
    folder.mkdir(exist_ok=True)
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens([word for word in words if not word.isalpha()])
    made.save(str(folder / "tokenizer.json"))
    if change:
        values = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(values | change))
    if told is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


def test_only_the_named_files_are_read_byte_for_byte(tmp_path):
    content = {name: f"{name} \r\n\xff".encode("latin-1") for name in tokenizer_files.FILES}
    for name, one in (content | {"tokenization_x.py": b"print()", "model.safetensors": b"x"}).items():
        (tmp_path / name).write_bytes(one)
    assert read_files(tmp_path) == read_files(tmp_path / "tokenizer.json") == content
    (tmp_path / "mine.json").write_bytes(b"{}")
    assert read_files(tmp_path / "mine.json") == {"tokenizer.json": b"{}"}
    assert read_files(tmp_path / "nowhere") == {}


def test_a_file_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "LARGEST", 10)
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 11)
    with pytest.raises(UserError, match="tokenizer.json has 11 bytes, and no tokenizer file has over 10"):
        read_files(tmp_path)


def test_the_size_is_above_the_largest_number(tmp_path):
    folder = write(tmp_path, {"[UNK]": 0, "ein": 7, "</s>": 3})
    assert open_published(folder).size == open_vocabulary(str(folder)).size == 8


WORDS = {"[UNK]": 0, "<s>": 1, "</s>": 2, "<go>": 3, "<stop>": 4, "ein": 5}


@pytest.mark.parametrize(
    ("told", "first", "end"),
    [
        (None, 1, 2),
        ({}, 1, 2),
        ({"add_bos_token": False, "bos_token": "<go>"}, None, 2),
        ({"add_bos_token": True, "bos_token": "<go>"}, 3, 2),
        ({"add_bos_token": True, "bos_token": {"content": "<go>"}}, 3, 2),
        ({"add_bos_token": True, "bos_token": "<none>", "eos_token": "<none>"}, 1, 2),
        ({"bos_token": "<go>", "eos_token": {"content": "<stop>"}}, 1, 4),
        ({"add_bos_token": None, "bos_token": ["<go>"], "eos_token": None}, 1, 2),
    ],
)
def test_special_tokens_follow_one_rule(tmp_path, told, first, end):
    folder = write(tmp_path, WORDS, told)
    found = open_published(folder)
    assert (found.first, found.end) == (first, end)
    start = [] if first is None else [first]
    assert open_vocabulary(str(folder)).encode(["ein ein"]) == [[*start, 5, 5, end]]


def test_files_that_cut_or_pad_do_neither_here(tmp_path):
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
    folder = write(tmp_path, WORDS, truncation=cut, padding=pad | {"pad_token": "[UNK]"})
    assert len(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("ein ein ein").ids) == 9
    assert open_published(folder).library.encode("ein ein ein").ids == [5, 5, 5]


@pytest.mark.parametrize("content", [b"{", b"[]", b"[" * 100_000])
def test_a_damaged_config_is_named(tmp_path, content):
    (write(tmp_path, WORDS) / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer_config.json is no JSON object"):
        open_published(tmp_path)


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    for name, content in byte_files().items():
        (folder / name).write_bytes(content)
    return folder


@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=40), ids=st.lists(st.integers(0, 258)))
def test_bytes_as_a_file_are_the_bytes(byte_folder, text, ids):
    found = open_published(byte_folder)
    assert (found.size, found.first, found.end) == (byte_level.VOCAB_SIZE, byte_level.BOS, byte_level.EOS)
    assert found.library.encode(text).ids == byte_level.encode(text)[:-1]
    assert found.library.decode(byte_level.encode(text)) == text
    assert found.library.decode(ids) == byte_level.decode(ids)


def test_numbers_of_the_special_bytes():
    assert list(BYTE_NAMES) == ["pad_token", "bos_token", "eos_token"]
    assert (byte_level.PAD, byte_level.BOS, byte_level.EOS) == (0, 1, 2)


def test_other_tokenizers_are_refused(tmp_path, byte_folder):
    own = write(tmp_path / "own", WORDS)
    check_same(own, own, "--data.tokenizer")
    check_same(write(tmp_path / "more", WORDS | {"neu": 6}), own, "--data.tokenizer")
    check_same(byte_folder, None, "--data.tokenizer")
    swapped = write(tmp_path / "swapped", WORDS | {"ein": 6, "neu": 5})
    with pytest.raises(
        UserError, match="--data.tokenizer .*swapped is another tokenizer .*token 5, 'ein', is number 6"
    ):
        check_same(swapped, own, "--data.tokenizer")
    with pytest.raises(UserError, match="than the byte-level one .*is none in it"):
        check_same(own, None, "--data.tokenizer")
    with pytest.raises(UserError, match="--data.tokenizer .*nothing has no tokenizer.json"):
        check_same(tmp_path / "nothing", own, "--data.tokenizer")


@pytest.mark.parametrize(("size", "holds"), [(258, False), (259, True), (1024, True), (1025, False)])
def test_vocabularies_that_may_be_bytes(size, holds):
    if holds:
        check_bytes(size, "x", "y")
    else:
        with pytest.raises(UserError, match=f"x has no tokenizer.json, and its vocabulary of {size} tokens .*: y"):
            check_bytes(size, "x", "y")
