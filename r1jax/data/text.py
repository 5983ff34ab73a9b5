"""Text in and out of a checkpoint: its own `tokenizer.json` where it has one, else bytes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from r1jax.data import tokenizer as byte_level
from r1jax.data.chat import BEGIN, Message, r1_chat
from r1jax.data.tokenizer_files import open_published, vocabulary_size
from r1jax.errors import UserError

CONTEXT = 8
"""Tokens that a stream decodes again with each new one: some decoders look at what came before."""


@dataclass(frozen=True)
class Tokenizer:
    """Text to tokens and back."""

    library: tokenizers.Tokenizer | None
    """None is byte level."""
    first: int | None
    """Token put before a plain prompt."""
    end: int | None = None
    """Token that ends a text."""

    @property
    def size(self) -> int:
        """Tokens that it gives are below this."""
        return vocabulary_size(self.library) if self.library else byte_level.VOCAB_SIZE

    def encode(self, text: str) -> list[int]:
        """Tokens of a plain prompt, the first token included."""
        if self.library is None:
            return byte_level.encode(text)[:-1]
        ids = self.library.encode(text, add_special_tokens=False).ids
        return ids if self.first is None or ids[:1] == [self.first] else [self.first, *ids]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation in R1's form.

        Args:
          messages: As in `r1jax.data.chat.r1_chat`.

        Returns:
          The tokens; at byte level the marks of the form are spelled out.

        Raises:
          UserError: The vocabulary lacks DeepSeek's marks, or the messages are no conversation.
        """
        text = r1_chat(messages)
        if self.library is None:
            return byte_level.encode(text.removeprefix(BEGIN))[:-1]
        if self.library.token_to_id(BEGIN) is None:
            raise UserError(f"chat: tokenizer.json has no token {BEGIN}, so it is not DeepSeek's: leave --chat out.")
        return self.library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text; special tokens are skipped, and bytes cut in mid-character become U+FFFD."""
        return byte_level.decode(ids) if self.library is None else self.library.decode(list(ids))


def load_tokenizer(path: Path | None) -> Tokenizer:
    """Reads a checkpoint's tokenizer.

    Args:
      path: tokenizer.json, or the folder that holds it; without one, tokens are taken to be bytes
        (`r1jax.data.tokenizer`).

    Returns:
      The tokenizer.

    Raises:
      UserError: A file cannot be read or is damaged.
    """
    found = None if path is None else open_published(path)
    if found is None:
        return Tokenizer(None, byte_level.BOS, byte_level.EOS)
    return Tokenizer(found.library, found.first, found.end)


class TextStream:
    """Turns tokens into text as they come, and never gives half a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._told = 0  # characters of these tokens' text

    def push(self, ids: Iterable[int]) -> str:
        """Takes new tokens.

        Args:
          ids: The next tokens.

        Returns:
          Text that is complete; a character whose last bytes are still to come is held back.
        """
        self._ids += ids
        text = self._tokenizer.decode(self._ids)
        ready = text.rstrip("\ufffd")
        new, self._told = ready[self._told :], len(ready)
        if ready == text and len(self._ids) > 2 * CONTEXT:
            self._ids = self._ids[-CONTEXT:]
            self._told = len(self._tokenizer.decode(self._ids))
        return new

    def close(self) -> str:
        """Returns what was held back; characters that stayed unfinished are U+FFFD."""
        text = self._tokenizer.decode(self._ids)
        new, self._told = text[self._told :], len(text)
        return new
