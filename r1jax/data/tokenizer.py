"""Byte-level tokenizer: no vocabulary to download, lossless on every script."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from r1jax.errors import UserError

PAD, BOS, EOS = 0, 1, 2
OFFSET = 3  # byte b is token b + OFFSET
VOCAB_SIZE = 256 + OFFSET


def check_vocabulary(size: int) -> None:
    """Refuses a decoder that lacks some of these tokens.

    Args:
      size: `model.decoder.vocab_size`.

    Raises:
      UserError: It is too small.
    """
    if size < VOCAB_SIZE:
        raise UserError(
            f"model.decoder.vocab_size is {size}, but the byte-level tokenizer has {VOCAB_SIZE} tokens; set it to at "
            "least that"
        )


def encode(text: str) -> list[int]:
    """UTF-8 bytes as tokens, between BOS and EOS."""
    return [BOS, *(byte + OFFSET for byte in text.encode("utf-8")), EOS]


def decode(tokens: Sequence[int]) -> str:
    """The text of `encode`; special tokens are skipped, and bytes cut in mid-character become U+FFFD."""
    return bytes(t - OFFSET for t in tokens if OFFSET <= t < VOCAB_SIZE).decode("utf-8", errors="replace")


def encode_batch(texts: Sequence[str], length: int) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Tokens of several texts, padded or cut to one length.

    Args:
      texts: The texts; an empty one has no valid token, as if it were missing.
      length: T.

    Returns:
      int32 tokens and which of them exist.
    """
    tokens = np.full((len(texts), length), PAD, np.int32)
    valid = np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts):
        if text:
            ids = encode(text)[:length]
            tokens[row, : len(ids)] = ids
            valid[row, : len(ids)] = True
    return tokens, valid
