import pytest
import tokenizers

from r1jax.data.vocabulary import open_vocabulary
from r1jax.errors import UserError


def write(path, *special):
    words = {word: i for i, word in enumerate(("[UNK]", "ein", "zwei", *special))}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(list(special))
    made.save(str(path / "tokenizer.json"))
    return str(path)


def test_bytes():
    vocabulary = open_vocabulary(None)
    assert vocabulary.size == 259 and vocabulary.end == 2
    assert vocabulary.encode(["ab", "é"]) == [[1, 100, 101, 2], [1, 198, 172, 2]]


def test_published_tokenizer(tmp_path):
    folder = write(tmp_path, "<s>", "</s>")
    for path in (folder, f"{folder}/tokenizer.json"):
        vocabulary = open_vocabulary(path)
        assert (vocabulary.size, vocabulary.end, vocabulary.name) == (5, 4, "tokenizer.json")
        assert vocabulary.encode(["ein zwei", "drei"]) == [[3, 1, 2, 4], [3, 0, 4]]


def test_the_end_appears_nowhere_else(tmp_path):
    vocabulary = open_vocabulary(write(tmp_path, "<|endoftext|>"))
    assert vocabulary.encode(["ein <|endoftext|> zwei"]) == [[1, 2, 3]]


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer.json"):
        open_vocabulary(str(tmp_path))
    write(tmp_path, "<s>")
    with pytest.raises(UserError, match="has none of the tokens .*one of which must end a document"):
        open_vocabulary(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="is no tokenizer of the tokenizers library"):
        open_vocabulary(str(tmp_path))
