"""Text in and out of a checkpoint: its own `tokenizer.json` where it has one, else bytes."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from r1jax.data import tokenizer as byte_level
from r1jax.data.chat import BEGIN, Message, r1_chat
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

    @property
    def size(self) -> int:
        """Tokens that it may give are below this."""
        return self.library.get_vocab_size() if self.library else byte_level.VOCAB_SIZE

    def encode(self, text: str) -> list[int]:
        """Tokens of a plain prompt, the first token included."""
        if self.library is None:
            return byte_level.encode(text)[:-1]
        ids = self.library.encode(text).ids
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


def load_tokenizer(folder: Path) -> Tokenizer:
    """Reads a checkpoint's tokenizer.

    Args:
      folder: The checkpoint; without tokenizer.json its tokens are taken to be bytes (`r1jax.data.tokenizer`).

    Returns:
      The tokenizer.

    Raises:
      UserError: A file is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return Tokenizer(None, byte_level.BOS)
    try:
        library = tokenizers.Tokenizer.from_str(path.read_text("utf-8"))
    except Exception as error:  # the library raises bare Exception
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is no tokenizer of the tokenizers library ({reason}): download it again.") from None
    return Tokenizer(library, _first_token(folder / "tokenizer_config.json", library))


def _first_token(path: Path, library: tokenizers.Tokenizer) -> int | None:
    """Token that `add_bos_token` asks for."""
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_bytes())
        token = told.get("bos_token") if told.get("add_bos_token") else None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is no JSON object ({error}): download it again.") from None
    name = token.get("content") if isinstance(token, dict) else token
    return None if name is None else library.token_to_id(name)


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
