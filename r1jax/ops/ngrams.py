"""Words, pairs of words and pieces of words of byte-level tokens as hashed numbers, computed where the tokens are."""

import re
from collections import Counter

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, UInt32

PIECES = (3, 4, 5)
"""Lengths in bytes of the pieces of words; the space before or after a word belongs to it."""
GROUPS = ((0, len(PIECES)), (len(PIECES), len(PIECES) + 2))
"""Of the last axis of `hashed_ngrams`: pieces, and words with pairs of words."""
_FIRST = 3  # byte b is token b + 3
_SPACE, _ZERO = 32, 48
_FACTOR = 0x01000193


def hashed_ngrams(
    tokens: Int[Array, "B T"], valid: Bool[Array, "B T"], buckets: int
) -> tuple[Int[Array, "B T kinds"], Bool[Array, "B T kinds"]]:
    """What ends at each byte of a text: pieces of three, four and five bytes, a word, and a pair of words.

    ASCII letters count alike in both cases, and so do digits. Words are runs of letters, digits and bytes beyond ASCII;
    a pair is a word and the one before it. `ngrams_of` says the same in plain Python.

    Args:
      tokens: Of the byte-level tokenizer.
      valid: Which of them exist.
      buckets: How many numbers there are.

    Returns:
      The number of each, from 0 to buckets - 1, and whether there is one.
    """
    x = _folded(tokens, valid)
    ids, exist = [], []
    for size in PIECES:
        hashed, gaps = jnp.uint32(0), jnp.zeros(x.shape, jnp.int32)
        for back in range(size - 1, -1, -1):
            byte = _back(x, back, _SPACE)
            hashed = hashed * jnp.uint32(_FACTOR) + byte
            if 0 < back < size - 1:
                gaps = gaps + (byte == _SPACE).astype(jnp.int32)
        ids.append(_mixed(hashed, size))
        exist.append(gaps == 0)  # its ends alone may be spaces, so that it lies in one word
    letter = _is_letter(x)
    word = _run_hashes(x, letter)
    end = letter & ~jnp.pad(letter[:, 1:], ((0, 0), (0, 1)))
    place = lax.cummax(jnp.where(end, jnp.arange(x.shape[1])[None], -1), axis=1)
    before = _back(place, 1, -1)
    previous = jnp.take_along_axis(word, jnp.maximum(before, 0), axis=1)
    ids += [_mixed(word, 1), _mixed(previous * jnp.uint32(_FACTOR) + _mixed(word, 1), 2)]
    exist += [end, end & (before >= 0)]
    numbers = jnp.stack(ids, axis=-1) % jnp.uint32(buckets)
    return numbers.astype(jnp.int32), jnp.stack(exist, axis=-1)


def ngrams_of(text: str, buckets: int) -> Counter[int]:
    """The reference of `hashed_ngrams`, one text at a time.

    Args:
      text: Any.
      buckets: How many numbers there are.

    Returns:
      How often each number occurs.
    """
    lower = bytes(c + 32 if 65 <= c <= 90 else c for c in text.encode())
    folded = re.sub(rb"[0-9]", b"0", re.sub(rb"[\x00-\x20]", b" ", lower))
    found = []
    for word in folded.split():
        padded = b" " + word + b" "
        for size in PIECES:
            found += [_plain(padded[i : i + size], size) for i in range(len(padded) - size + 1)]
    words = re.findall(rb"[a-z0\x80-\xff]+", folded)
    found += [_plain(word, 1) for word in words]
    for one, two in zip(words, words[1:], strict=False):
        found.append(_plain_mixed((_polynomial(one) * _FACTOR + _plain(two, 1)) % 2**32, 2))
    return Counter(number % buckets for number in found)


def _folded(tokens: Int[Array, "B T"], valid: Bool[Array, "B T"]) -> UInt32[Array, "B T"]:
    """Bytes in lower case, digits as 0, and a space for white space, control characters and what does not exist."""
    x = jnp.where(valid & (tokens >= _FIRST), tokens - _FIRST, _SPACE).astype(jnp.uint32)
    x = jnp.where((x >= 65) & (x <= 90), x + 32, x)
    x = jnp.where((x >= 48) & (x <= 57), _ZERO, x)
    return jnp.where(x < _SPACE, _SPACE, x).astype(jnp.uint32)


def _is_letter(x: UInt32[Array, "B T"]) -> Bool[Array, "B T"]:
    return (x >= 128) | (x == _ZERO) | ((x >= 97) & (x <= 122))


def _back(x: Array, places: int, fill: int | bool) -> Array:
    """The value so many places before."""
    return jnp.pad(x, ((0, 0), (places, 0)), constant_values=fill)[:, : x.shape[1]]


def _run_hashes(x: UInt32[Array, "B T"], letter: Bool[Array, "B T"]) -> UInt32[Array, "B T"]:
    """Polynomial hash of the letters up to each place, from the beginning of its run: h' = h f + x, and 0 between."""

    def then(one: tuple[Array, Array], two: tuple[Array, Array]) -> tuple[Array, Array]:
        return one[0] * two[0], one[1] * two[0] + two[1]

    factor = jnp.where(letter, jnp.uint32(_FACTOR), jnp.uint32(0))
    return lax.associative_scan(then, (factor, jnp.where(letter, x, jnp.uint32(0))), axis=1)[1]


def _mixed(hashed: UInt32[Array, "B T"], kind: int) -> UInt32[Array, "B T"]:
    """Spreads a hash over all bits (MurmurHash3's last step), another way for each kind."""
    x = hashed + jnp.uint32(kind * 0x9E3779B9 % 2**32)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _polynomial(raw: bytes) -> int:
    hashed = 0
    for byte in raw:
        hashed = (hashed * _FACTOR + byte) % 2**32
    return hashed


def _plain(raw: bytes, kind: int) -> int:
    return _plain_mixed(_polynomial(raw), kind)


def _plain_mixed(hashed: int, kind: int) -> int:
    x = (hashed + kind * 0x9E3779B9) % 2**32
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)
