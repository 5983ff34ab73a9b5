"""Text to tokens for the language task: bytes, or a `tokenizer.json` as Hugging Face writes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from r1jax.data import tokenizer
from r1jax.errors import UserError

ENDS = ("<｜end▁of▁sentence｜>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
"""Tokens that end a document, as published tokenizers call them."""
STARTS = ("<｜begin▁of▁sentence｜>", "<s>", "<bos>")
"""Tokens that begin one; a tokenizer without any has documents that begin with their first word."""


@dataclass(frozen=True)
class Vocabulary:
    """How documents become tokens."""

    name: str
    size: int
    end: int
    """Token that ends a document, and appears nowhere else."""
    encode: Callable[[Sequence[str]], list[list[int]]]
    """Tokens of each document, from the token that begins one, if there is such a token, to `end`."""


def open_vocabulary(path: str | None) -> Vocabulary:
    """Opens a tokenizer.

    Args:
      path: `tokenizer.json`, or the folder that holds it; None takes the byte-level tokenizer.

    Returns:
      Its vocabulary.

    Raises:
      UserError: The file is missing or damaged, or the tokenizer has no token that ends a document.
    """
    if path is None:
        encode = lambda texts: [tokenizer.encode(text) for text in texts]  # noqa: E731
        return Vocabulary("bytes", tokenizer.VOCAB_SIZE, tokenizer.EOS, encode)
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"data.tokenizer {path} has no tokenizer.json: give one, or leave it out to read bytes")
    try:
        read = tokenizers.Tokenizer.from_str(file.read_text("utf-8"))
    except Exception as error:  # the library raises plain Exception
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} is no tokenizer of the tokenizers library ({reason}): give another one") from None
    end = next((i for i in map(read.token_to_id, ENDS) if i is not None), None)
    if end is None:
        raise UserError(f"{file} has none of the tokens {', '.join(ENDS)}, one of which must end a document")

    start = [i for i in map(read.token_to_id, STARTS) if i is not None][:1]

    def encode_all(texts: Sequence[str]) -> list[list[int]]:
        found = read.encode_batch(list(texts), add_special_tokens=False)
        return [[*start, *(i for i in one.ids if i != end), end] for one in found]

    return Vocabulary(file.name, read.get_vocab_size(), end, encode_all)
