"""In which order rows are read: batch k is a pure function of (seed, k), so that a run goes on from one integer."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt64

from r1jax.config import DataConfig
from r1jax.data.source import Source
from r1jax.errors import UserError

VERSION = 1
"""Raised whenever the same seed gives another order."""
SORTED = 1 << 16
"""Up to so many rows are permuted by sorting random keys: a Feistel network over few values is far from uniform."""
ROUNDS = 8


class GlobalOrder:
    """Each epoch is another pseudo-random permutation of all rows; needs memory for one batch, or for `SORTED` rows."""

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        """States the order; nothing is permuted yet.

        Args:
          rows: Rows of the source.
          batch_size: Rows a batch; an epoch's remainder goes into the next epoch's first batch.
          seed: Other seeds give other orders.
        """
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._sorted = functools.lru_cache(maxsize=2)(self._sort)

    def __reduce__(self) -> tuple[Any, ...]:
        return GlobalOrder, (self.rows, self.batch_size, self.seed)

    def batch(self, k: int) -> Int64[np.ndarray, " B"]:
        """Finds the rows of a batch.

        Args:
          k: Which batch, from 0, without end.

        Returns:
          Row indices.
        """
        return self.stretch(k * self.batch_size, self.batch_size)

    def stretch(self, first: int, count: int) -> Int64[np.ndarray, " n"]:
        """Rows `first` to `first + count` of the endless sequence that batches are cut from."""
        return np.concatenate([self._at(epoch, places) for epoch, places in _places(first, count, self.rows)])

    def _at(self, epoch: int, places: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        if self.rows <= SORTED:
            return self._sorted(epoch)[places]
        return feistel(places, self.rows, _random(ROUNDS, self.seed, epoch))

    def _sort(self, epoch: int) -> Int64[np.ndarray, " n"]:
        return np.argsort(_random(self.rows, self.seed, epoch), kind="stable")


class WindowOrder:
    """Row groups in another order each epoch, rows shuffled within windows of some groups.

    A window is read as a few whole row groups, which is many times faster than single rows of a file; what is lost
    against a global shuffle is that rows of one group stay within one window. Needs memory for the rows of a window.
    """

    def __init__(self, starts: Int64[np.ndarray, " starts"], batch_size: int, seed: int, window: int) -> None:
        """States the order; nothing is permuted yet.

        Args:
          starts: First row of each row group, and the number of rows.
          batch_size: Rows a batch; an epoch's remainder goes into the next epoch's first batch.
          seed: Other seeds give other orders.
          window: Row groups a window.

        Raises:
          UserError: `starts` does not rise from 0.
        """
        if len(starts) < 2 or starts[0] != 0 or (np.diff(starts) < 0).any() or starts[-1] == 0:
            raise UserError(f"row groups must start at 0 and rise, but they start at {starts[:4].tolist()}...")
        self.starts, self.batch_size, self.seed, self.window = starts, batch_size, seed, window
        self.rows = int(starts[-1])
        self._epoch = functools.lru_cache(maxsize=2)(self._permute_groups)
        self._rows = functools.lru_cache(maxsize=4)(self._permute_window)

    def __reduce__(self) -> tuple[Any, ...]:
        return WindowOrder, (self.starts, self.batch_size, self.seed, self.window)

    def batch(self, k: int) -> Int64[np.ndarray, " B"]:
        """Finds the rows of a batch.

        Args:
          k: Which batch, from 0, without end.

        Returns:
          Row indices.
        """
        return self.stretch(k * self.batch_size, self.batch_size)

    def stretch(self, first: int, count: int) -> Int64[np.ndarray, " n"]:
        """Rows `first` to `first + count` of the endless sequence that batches are cut from."""
        found = []
        for epoch, places in _places(first, count, self.rows):
            _, ends = self._epoch(epoch)
            windows = np.searchsorted(ends, places, side="right")
            for window in range(int(windows[0]), int(windows[-1]) + 1):
                begin = int(ends[window - 1]) if window else 0
                found.append(self._rows(epoch, window)[places[windows == window] - begin])
        return np.concatenate(found)

    def _permute_groups(self, epoch: int) -> tuple[Int64[np.ndarray, " G"], Int64[np.ndarray, " W"]]:
        """Groups in the order of the epoch, and the place at which each window ends."""
        groups = np.argsort(_random(len(self.starts) - 1, self.seed, epoch), kind="stable")
        sizes = np.diff(self.starts)[groups]
        return groups, np.cumsum(np.add.reduceat(sizes, np.arange(0, len(sizes), self.window)))

    def _permute_window(self, epoch: int, window: int) -> Int64[np.ndarray, " n"]:
        groups = self._epoch(epoch)[0][window * self.window : (window + 1) * self.window]
        firsts, sizes = self.starts[groups], self.starts[groups + 1] - self.starts[groups]
        ends = np.cumsum(sizes)
        rows = np.arange(ends[-1]) + np.repeat(firsts - (ends - sizes), sizes)
        return rows[np.argsort(_random(len(rows), self.seed, epoch, window + 1), kind="stable")]


class MixedOrder:
    """Several sources by turns in exact proportions, each in its own order and with its own epochs.

    Of every `sum(weights)` consecutive rows, wherever they begin, each source gives as many as its weight says.
    """

    def __init__(self, orders: Sequence[GlobalOrder | WindowOrder], weights: Sequence[int], batch_size: int) -> None:
        """States the order.

        Args:
          orders: Of each source; their batch sizes do not matter.
          weights: Rows of each source in a turn.
          batch_size: Rows a batch.
        """
        self.orders, self.weights, self.batch_size = tuple(orders), tuple(weights), batch_size
        self.offsets = np.cumsum([0, *(order.rows for order in orders)])
        self.rows = int(self.offsets[-1])
        owners = np.repeat(np.arange(len(weights)), weights)
        due = np.concatenate([(np.arange(weight) + 0.5) / weight for weight in weights])
        self._turn = owners[np.argsort(due, kind="stable")]  # evenly spread, not one source after the other

    def batch(self, k: int) -> Int64[np.ndarray, " B"]:
        """Finds the rows of a batch.

        Args:
          k: Which batch, from 0, without end.

        Returns:
          Row indices, those of a source after those of the sources before it.
        """
        first, length = k * self.batch_size, len(self._turn)
        owners = self._turn[(first % length + np.arange(self.batch_size)) % length]
        found = np.empty(self.batch_size, np.int64)
        for i, (order, weight) in enumerate(zip(self.orders, self.weights, strict=True)):
            mine = np.flatnonzero(owners == i)
            before = first // length * weight + int((self._turn[: first % length] == i).sum())
            if len(mine):
                found[mine] = order.stretch(before, len(mine)) + self.offsets[i]
        return found


Order = GlobalOrder | WindowOrder | MixedOrder


def feistel(places: Int64[np.ndarray, " n"], rows: int, keys: UInt64[np.ndarray, "8"]) -> Int64[np.ndarray, " n"]:
    """A pseudo-random permutation at single places: a balanced Feistel network, walked on until it lands below `rows`.

    The round function is the finaliser of SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators",
    2014); cycle walking is Black and Rogaway's ("Ciphers with arbitrary finite domains", 2002).

    Args:
      places: From 0 to rows - 1.
      rows: Size of the permutation, at least 2.
      keys: One a round; they choose the permutation.

    Returns:
      Where the places go; other places go elsewhere.
    """
    half = np.uint64(max(1, ((rows - 1).bit_length() + 1) // 2))  # the network covers 4^half, at most 4 times the rows
    mask = np.uint64((1 << int(half)) - 1)
    found = places.astype(np.uint64)
    open_ = np.arange(len(found))  # places whose walk has not come to an end
    while len(open_):
        left, right = found[open_] >> half, found[open_] & mask
        for i in range(ROUNDS):
            mixed = _mix(right + keys[i])
            left, right = right, (left ^ mixed) & mask
        found[open_] = (left << half) | right
        open_ = open_[found[open_] >= np.uint64(rows)]
    return found.astype(np.int64)


def _mix(x: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Finaliser of SplitMix64; sums and products wrap at 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _random(count: int, seed: int, epoch: int, part: int = 0) -> UInt64[np.ndarray, " n"]:
    """Raw bits of Philox, which NumPy promises never to change, unlike what its generators make of them."""
    key = np.array([seed | (part << 32), epoch], np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def _places(first: int, count: int, rows: int) -> list[tuple[int, Int64[np.ndarray, " n"]]]:
    """The epochs that a stretch touches, and its places in each."""
    found, end = [], first + count
    while first < end:
        epoch, place = divmod(first, rows)
        some = min(rows - place, end - first)
        found.append((epoch, np.arange(place, place + some)))
        first += some
    return found


def open_order(source: Source, batch_size: int, data: DataConfig) -> Order:
    """The order that the config asks for.

    Args:
      source: The training cases; those of `Mixed` come in its proportions.
      batch_size: Cases a global batch.
      data: Seed, kind and window.

    Returns:
      The order.

    Raises:
      UserError: A window is asked of a source without row groups.
    """
    weights = getattr(source, "weights", None)
    if weights is None:
        return _plain_order(source, batch_size, data, data.seed)
    seeds = [int(_random(1, data.seed, 0, part=i + 1)[0] >> np.uint64(32)) for i in range(len(weights))]
    parts = zip(source.sources, seeds, strict=True)
    return MixedOrder([_plain_order(part, batch_size, data, seed) for part, seed in parts], weights, batch_size)


def _plain_order(source: Source, batch_size: int, data: DataConfig, seed: int) -> GlobalOrder | WindowOrder:
    if data.order == "global":
        return GlobalOrder(len(source), batch_size, seed)
    starts = getattr(source, "starts", None)
    if starts is None:
        raise UserError(
            f"data.order is 'window', but {source.name!r} has no row groups: give Parquet files as data.path, or set "
            "data.order to 'global'"
        )
    return WindowOrder(starts, batch_size, seed, data.window)


def describe_order(source: Source, batch_size: int, data: DataConfig) -> dict[str, Any]:
    """What a checkpoint says of the order, beside the next batch; JSON-able."""
    return {
        "version": VERSION,
        "order": data.order,
        "window": data.window if data.order == "window" else None,
        "seed": data.seed,
        "batch_size": batch_size,
        "fingerprint": source.fingerprint,
    }
