"""Batches of a source in a stateless order: batch k is a pure function of (seed, k), so resuming needs one integer."""

from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from r1jax.data.source import Source

Collate = Callable[[dict[str, Any]], dict[str, np.ndarray]]


def training_batches(
    source: Source, collate: Collate, *, batch_size: int, seed: int, start: int, threads: int
) -> Iterator[dict[str, np.ndarray]]:
    """Endless shuffled batches, each epoch in another order.

    Indices are batched before anything is read, so that a source reads a batch at once.

    Args:
      source: The cases.
      collate: Turns a raw batch into arrays.
      batch_size: Cases a batch; an epoch's remainder goes into the next epoch's first batch.
      seed: Seed of the order.
      start: Batches already used.
      threads: Reading threads; the order does not depend on them.

    Yields:
      Collated batches, from batch number `start`.
    """
    order = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat().batch(batch_size)
    dataset = order.map(lambda indices: collate(source.read_batch(np.asarray(indices))))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    iterator = iter(dataset.to_iter_dataset(options))
    iterator.set_state({"next_index": start})
    return iterator


def padded_batches(
    source: Source, collate: Collate, *, batch_size: int
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any]]]:
    """Every case once and in order; the last batch repeats its last case, so that all batches have one shape.

    Args:
      source: The cases.
      collate: Turns a raw batch into arrays.
      batch_size: Cases a batch.

    Yields:
      Indices of the cases (without the repeats), the collated batch, the raw batch.
    """
    for first in range(0, len(source), batch_size):
        indices = np.arange(first, min(first + batch_size, len(source)))
        filled = np.concatenate([indices, np.full(batch_size - len(indices), indices[-1])])
        raw = source.read_batch(filled)
        yield indices, collate(raw), raw
