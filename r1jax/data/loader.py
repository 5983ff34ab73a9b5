"""Batches of a source in a stateless order: resuming needs one integer, whatever reads them."""

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from r1jax.data.order import Order
from r1jax.data.source import Source
from r1jax.data.workers import Batches, Read, Workers, read_in_threads
from r1jax.errors import UserError

Collate = Callable[[dict[str, Any]], dict[str, np.ndarray]]


class Share(NamedTuple):
    """Which part of every global batch a process of several reads."""

    index: int = 0
    count: int = 1


class Reader:
    """Reads and collates batch k, in whichever thread or process it is asked to."""

    def __init__(
        self, source: Source, collate: Collate, order: Order, *, share: Share, ahead: int, stride: int
    ) -> None:
        """Puts together what a batch needs.

        Args:
          source: The cases.
          collate: Turns a raw batch into arrays.
          order: Gives the rows of each global batch.
          share: Which part of them is read.
          ahead: Batches that the source is told of before they are read, where it has `prefetch`.
          stride: Batches from one that this reader reads to the next.
        """
        self.source, self.collate, self.order, self.share = source, collate, order, share
        self.depth, self.stride = -(-ahead // stride) * stride, stride
        self.announced: int | None = None
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("announced", "lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.announced, self.lock = None, threading.Lock()  # every process tells its own copy of the source

    def __call__(self, k: int) -> Read:
        """Reads a batch.

        Args:
          k: Number of the global batch.

        Returns:
          The collated batch, the process that read it, and the counters of its source so far.
        """
        self._announce(k)
        rows = self._rows(k)
        random = getattr(self.source, "read_training_batch", None)
        raw = self.source.read_batch(rows) if random is None else random(rows, k)
        counters = getattr(self.source, "counters", dict)()
        return Read(self.collate(raw), os.getpid(), counters)

    def _rows(self, k: int) -> np.ndarray:
        part = self.order.batch_size // self.share.count
        return self.order.batch(k)[self.share.index * part : (self.share.index + 1) * part]

    def _announce(self, k: int) -> None:
        """Tells the source of the next batches of this reader, each once, though threads come in any order."""
        prefetch = getattr(self.source, "prefetch", None)
        if prefetch is None or not self.depth:
            return
        with self.lock:
            told = k if self.announced is None else self.announced
            coming = range(told + self.stride, k + self.depth + 1, self.stride)
            self.announced = max(told, k + self.depth)
        for later in coming:
            prefetch(self._rows(later))


def training_batches(
    source: Source,
    collate: Collate,
    order: Order,
    *,
    start: int,
    threads: int,
    workers: int = 0,
    ahead: int = 0,
    share: Share = Share(),  # noqa: B008
) -> Batches:
    """Endless batches in the given order; they do not depend on threads, workers or the number of processes.

    Indices are batched before anything is read, so that a source reads a batch at once.

    Args:
      source: The cases.
      collate: Turns a raw batch into arrays.
      order: Gives the rows of each global batch.
      start: Batches already used.
      threads: Reading threads, in each worker where there are some.
      workers: Processes that read and collate; 0 does it here.
      ahead: Batches that a source with `prefetch` is told of before they are read.
      share: Part of every global batch that this process reads; the parts in order are the batch.

    Returns:
      Iterator over collated batches, from batch number `start`; to be closed.

    Raises:
      UserError: The batches cannot be shared evenly.
    """
    if order.batch_size % share.count:
        raise UserError(
            f"train.batch_size is {order.batch_size}, which {share.count} processes cannot share evenly: make it a "
            "multiple"
        )
    reader = Reader(source, collate, order, share=share, ahead=ahead, stride=max(workers, 1))
    if workers:
        return Batches(Workers(reader, start, threads, workers))
    return Batches(read_in_threads(reader, start, 1, threads))


def padded_batches(
    source: Source,
    collate: Collate,
    *,
    batch_size: int,
    share: Share = Share(),  # noqa: B008
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any]]]:
    """Every case once and in order; the last batch repeats its last case, so that all batches have one shape.

    Args:
      source: The cases.
      collate: Turns a raw batch into arrays.
      batch_size: Cases a batch.
      share: Part of every batch that is read here; the parts in order are the batch.

    Yields:
      Indices of the cases of the whole batch (without the repeats), and of this part with its repeats the collated
      batch and the raw one.
    """
    part = batch_size // share.count
    for first in range(0, len(source), batch_size):
        indices = np.arange(first, min(first + batch_size, len(source)))
        filled = np.concatenate([indices, np.full(batch_size - len(indices), indices[-1])])
        raw = source.read_batch(filled[share.index * part : (share.index + 1) * part])
        yield indices, collate(raw), raw
