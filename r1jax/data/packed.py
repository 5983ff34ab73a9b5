"""Documents packed into sequences of one length, without padding between them (a `Source`)."""

import hashlib
import itertools
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int, UInt64

from r1jax.data.schema import Field, Schema
from r1jax.data.sentences import document
from r1jax.data.vocabulary import Vocabulary

VERSION = 1
"""Raised whenever the same documents give other sequences."""
GROUP = 1024
"""Documents that are tokenized at once."""
SEEDS = {"train": 0, "val": 1, "test": 2}


class PackedText:
    """Sequences cut from one stream of documents, each ended by the vocabulary's `end`.

    Neighbours share one token, so that every token of the stream is predicted exactly once. A sequence may begin in the
    midst of a document and hold several; attention crosses their borders, as in DeepSeek-V3 (section 4.1). The last
    sequence is padded.
    """

    def __init__(
        self,
        name: str,
        documents: Iterable[str],
        vocabulary: Vocabulary,
        length: int,
        *,
        entropy: float | None = None,
    ) -> None:
        """Tokenizes the documents; all tokens stay in memory, 4 bytes each.

        Args:
          name: What the text is, for people.
          documents: Texts.
          vocabulary: Turns them into tokens.
          length: T.
          entropy: Nats that the documents hold, where that is known.
        """
        stream, size, hashes = [], 0, []
        texts = iter(documents)
        while group := list(itertools.islice(texts, GROUP)):
            stream += [np.asarray(ids, np.int32) for ids in vocabulary.encode(group)]
            encoded = [text.encode() for text in group]
            size += sum(map(len, encoded))
            hashes += [int.from_bytes(hashlib.sha256(text).digest()[:8], "big") for text in encoded]
        self.document_hashes: UInt64[np.ndarray, " d"] = np.array(hashes, np.uint64)
        self.document_lengths: Int[np.ndarray, " d"] = np.array([len(ids) for ids in stream])
        self.tokens: Int[np.ndarray, " n"] = np.concatenate(stream)
        self.length, self.end = length, vocabulary.end
        self.schema = Schema(
            (
                Field("case_id", "category"),
                Field("text", "text", "int32", (length,)),
                Field("text_valid", "number", "bool", (length,)),
                Field("bytes", "number", "float32"),
            )
        )
        self.name = f"{name}, {len(self.tokens):,} tokens ({vocabulary.name}) in sequences of {length}"
        head = f"{VERSION} {length} {vocabulary.end} {vocabulary.size} ".encode()
        self.fingerprint = hashlib.sha256(head + self.tokens.tobytes()).hexdigest()
        targets = max(len(self.tokens) - len(hashes), 1)  # the first token of a document is not predicted
        self.bytes_per_target = size / targets
        self.entropy = None if entropy is None else entropy / targets

    def __len__(self) -> int:
        """Number of sequences."""
        return -(-(len(self.tokens) - 1) // (self.length - 1))

    def holding(self, other: "PackedText") -> int:
        """Counts the sequences that predict tokens of documents which another text holds too.

        Args:
          other: For example the text that a model was trained on.

        Returns:
          How many of the sequences they are; documents are compared by hash.
        """
        shared = np.repeat(np.isin(self.document_hashes, other.document_hashes), self.document_lengths)
        shared[np.cumsum(self.document_lengths) - self.document_lengths] = (
            False  # first tokens, which are not predicted
        )
        targets = np.zeros(len(self) * (self.length - 1), bool)
        targets[: len(shared) - 1] = shared[1:]
        return int(targets.reshape(len(self), -1).any(axis=1).sum())

    def read_batch(self, indices: Int[np.ndarray, " B"]) -> dict[str, np.ndarray | list[str]]:
        """Reads sequences.

        Args:
          indices: Which of them.

        Returns:
          "case_id"; "text": int32 [B, T]; "text_valid": bool [B, T]; "bytes": float32 [B], UTF-8 bytes that the
          predicted tokens of each sequence stand for, by the mean of the whole text.
        """
        places = indices[:, None] * (self.length - 1) + np.arange(self.length)[None]
        valid = places < len(self.tokens)
        text = np.where(valid, self.tokens[np.minimum(places, len(self.tokens) - 1)], 0).astype(np.int32)
        counted = (valid[:, 1:] & (text[:, :-1] != self.end)).sum(axis=1)
        return {
            "case_id": [f"sequence {i}" for i in indices],
            "text": text,
            "text_valid": valid,
            "bytes": (counted * self.bytes_per_target).astype(np.float32),
        }


def synthetic_text(seed: int, sequences: int, part: str, vocabulary: Vocabulary, length: int) -> PackedText:
    """Generated documents that fill the sequences; `entropy` is what their distribution leaves open.

    Args:
      seed: Other seeds give other documents.
      sequences: How many are wanted; the end of the last document may begin one more.
      part: "train", "val" or "test"; each has its own stream of random numbers.
      vocabulary: Turns documents into tokens.
      length: T.

    Returns:
      The source.
    """
    rng = np.random.default_rng((seed, SEEDS[part]))
    texts, nats, left = [], 0.0, sequences * (length - 1) + 1
    while left > 0:
        drawn = [document(rng) for _ in range(GROUP)]
        lengths = [len(ids) for ids in vocabulary.encode([text for text, _ in drawn])]
        needed = int(np.searchsorted(np.cumsum(lengths), left)) + 1
        texts += [text for text, _ in drawn[:needed]]
        nats, left = nats + sum(more for _, more in drawn[:needed]), left - sum(lengths[:needed])
    return PackedText(f"synthetic text (generated), seed {seed}, {part}", texts, vocabulary, length, entropy=nats)
