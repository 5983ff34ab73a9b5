"""Prompts as the decoder reads them: padding moved to the end, and pages of the cache given out."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Int

from r1jax.arguments import GenerationSettings
from r1jax.config import DecoderConfig
from r1jax.errors import UserError


class Batch(NamedTuple):
    """A batch of prompts."""

    tokens: Int[np.ndarray, "B T"] | Int[Array, "B T"]
    """Padded at the end to whole pages."""
    lengths: Int[np.ndarray, " B"] | Int[Array, " B"]
    table: Int[np.ndarray, "B n"] | Int[Array, "B n"]
    """Page of the cache that holds each row's tokens 0..page_size-1, and so on."""
    rows: Int[np.ndarray, " B"] | Int[Array, " B"]
    """Number of each row, for its draws."""


def lay_out(
    prompts: Sequence[Sequence[int]] | Int[np.ndarray, "B T"],
    attention_mask: np.ndarray | None,
    rows: Sequence[int] | None,
    config: DecoderConfig,
    settings: GenerationSettings,
) -> tuple[Batch, int]:
    """Checks prompts against the model, and gives each row the pages for its prompt and its answer, no more.

    Args:
      prompts: Tokens of each prompt, or an array of them.
      attention_mask: Which tokens of an array exist, bool or 0 and 1 [B, T]; None takes all.
      rows: Number of each row; None counts from 0.
      config: The decoder.
      settings: How many tokens a row may get, and how large a page is.

    Returns:
      The batch, and P, the number of pages: the sum over rows of ceil((prompt + max_new_tokens) / page_size).

    Raises:
      UserError: A prompt is empty or holds an unknown token, or the settings do not fit the model.
    """
    check_settings(config, settings)
    kept = _existing(prompts, attention_mask)
    for row, ids in enumerate(kept):
        if not len(ids):
            raise UserError(f"prompts: row {row} has no token, but each must have at least one.")
        outside = ids[(ids < 0) | (ids >= config.vocab_size)]
        if len(outside):
            raise UserError(
                f"prompts: row {row} holds the token {outside[0]}, but vocab_size is {config.vocab_size}: "
                "tokenize it with the checkpoint's own tokenizer."
            )
    if rows is not None and len(rows) != len(kept):
        raise UserError(f"rows has {len(rows)} numbers, but there are {len(kept)} prompts; give one each.")
    page = settings.page_size
    lengths = np.array([len(ids) for ids in kept], np.int32)
    tokens = np.zeros((len(kept), -(-lengths.max() // page) * page), np.int32)
    for row, ids in enumerate(kept):
        tokens[row, : len(ids)] = ids
    counts = -(-(lengths + settings.max_new_tokens) // page)
    table = np.zeros((len(kept), counts.max()), np.int32)
    firsts = np.cumsum(counts) - counts
    for row, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        table[row, :count] = np.arange(first, first + count)
    numbers = np.arange(len(kept), dtype=np.int32) if rows is None else np.asarray(rows, np.int32)
    return Batch(tokens, lengths, table, numbers), int(counts.sum())


def check_settings(config: DecoderConfig, settings: GenerationSettings) -> None:
    """Refuses settings that the model cannot follow.

    Args:
      config: The decoder.
      settings: What was asked for.

    Raises:
      UserError: Names the setting, its value and what to do.
    """
    if settings.speculate and settings.temperature > 0:
        raise UserError(
            f"speculate is True and temperature is {settings.temperature}, but only greedy answers are the same with "
            "and without speculation; set temperature to 0 or leave speculate out."
        )
    if settings.speculate and not config.num_nextn_predict_layers:
        raise UserError(
            "speculate is True, but the model has no MTP layer (num_nextn_predict_layers is 0); leave it out."
        )
    for token in settings.stop_tokens:
        if token >= config.vocab_size:
            raise UserError(f"stop_tokens holds {token}, but it must be below vocab_size ({config.vocab_size}).")


def _existing(
    prompts: Sequence[Sequence[int]] | Int[np.ndarray, "B T"],
    attention_mask: np.ndarray | None,
) -> list[Int[np.ndarray, " t"]]:
    """Tokens of each row that exist, wherever its padding is."""
    if len(prompts) == 0:
        raise UserError("prompts is empty; give at least one.")
    if attention_mask is None:
        return [np.asarray(ids, np.int64).reshape(-1) for ids in prompts]
    try:
        ids, mask = np.asarray(prompts), np.asarray(attention_mask)
    except ValueError:  # NumPy's own message speaks of inhomogeneous shapes
        raise UserError(
            "attention_mask is given, but the prompts or its own rows are lists of unequal lengths; pad both to one "
            "array [B, T], or leave attention_mask out."
        ) from None
    if ids.ndim != 2 or ids.shape != mask.shape:
        raise UserError(f"attention_mask has shape {mask.shape} and prompts {ids.shape}; both must be the same [B, T].")
    return [row[keep] for row, keep in zip(ids.astype(np.int64), mask.astype(bool), strict=True)]
