"""Documents to tokens for the language task: bytes, or a `tokenizer.json` as Hugging Face writes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1jax.data import tokenizer
from r1jax.data.tokenizer_files import ENDS, open_published
from r1jax.errors import UserError


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
    found = open_published(Path(path))
    if found is None:
        raise UserError(f"data.tokenizer {path} has no tokenizer.json: give one, or leave it out to read bytes")
    library, end = found.library, found.end
    if end is None:
        raise UserError(
            f"data.tokenizer {path} names no eos_token and has none of the tokens {', '.join(ENDS)}, one of which must "
            "end a document"
        )
    start = [] if found.first is None else [found.first]

    def encode_all(texts: Sequence[str]) -> list[list[int]]:
        encoded = library.encode_batch(list(texts), add_special_tokens=False)
        return [[*start, *(i for i in one.ids if i != end), end] for one in encoded]

    return Vocabulary("tokenizer.json", found.size, end, encode_all)
