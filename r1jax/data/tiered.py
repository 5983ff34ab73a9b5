"""A cold store behind tiers of a cache: process memory, then LMDB or Redis, then the files themselves."""

import os
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from r1jax.config import CacheConfig
from r1jax.data.blocks import BlockStore
from r1jax.data.cache import GuardedTier, open_tier
from r1jax.data.cache_counters import CacheCounters, Tally
from r1jax.data.cache_memory import Memory, ServeMemory, TrainMemory
from r1jax.data.cache_values import BlockCodec, dataset_name, key_of
from r1jax.data.prefetch import Prefetcher
from r1jax.data.single_flight import SingleFlight
from r1jax.errors import UserError
from r1jax.validation import check_cache_url

STORE_EVERY_S = 10.0
"""How often a reader adds its counters to those in the shared tier."""
LEASE_WAIT_S = 1.0
"""Most that a reader waits for another process that reads the same block."""
LEASE_POLL_S = 0.01
ANNOUNCED = 1024
"""Most requests that are expected; the oldest of more will not be made."""
AHEAD = 8
"""Units that the prefetch thread reads in one go: what it holds in its hands is bounded."""


class TieredStore:
    """Rows of a cold store by index, read through a cache; always the rows of the cold store, whatever the cache does.

    Picklable, and usable after a fork: connections, locks and threads are made in the process that needs them.

    Attributes:
      cold: The store behind.
      cache: Which tiers.
    """

    def __init__(self, cold: BlockStore, cache: CacheConfig) -> None:
        """Prepares the tiers; nothing is read or connected yet.

        Args:
          cold: Where the rows are.
          cache: Which tiers, and what they keep.

        Raises:
          UserError: The cache's URL is wrong, or its library is missing.
        """
        check_cache_url("data.cache.url", cache.url, secrets=True)
        self.cold, self.cache = cold, cache
        self._process = os.getpid()
        self._tiers = _Tiers(cold, cache)

    def __getstate__(self) -> dict[str, Any]:
        """Only what was asked for travels to another process."""
        return {"cold": self.cold, "cache": self.cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.cold)

    def read_rows(self, indices: Int[np.ndarray, " B"]) -> pa.Table:
        """Reads rows.

        Args:
          indices: Which, 0 <= index < len(self), in any order, also repeated.

        Returns:
          One row an index, in their order, with the columns and types of the cold store's schema.

        Raises:
          IndexError: There is no such row.
          UserError: The cold store cannot be read, or has changed.
        """
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"rows {indices.min()} to {indices.max()} of a store of {len(self)}")
        return self._here().read_rows(indices)

    def prefetch(self, indices: Int[np.ndarray, " B"]) -> None:
        """Brings rows that will be read into the tiers, in the background; returns at once.

        Args:
          indices: Of one later call of `read_rows`; those outside the store are ignored.
        """
        inside = indices[(indices >= 0) & (indices < len(self))]
        self._here().prefetch(inside)

    def drain(self) -> None:
        """Waits until everything that `prefetch` was told is done."""
        self._here().prefetcher.drain()

    def counters(self) -> CacheCounters:
        """What the tiers have done in this process.

        Returns:
          The counters.
        """
        return self._here().counters()

    def store_counters(self) -> None:
        """Adds this process's counters to those in the shared tier now, rather than within ten seconds of reading."""
        self._here().store_counters()

    def _here(self) -> "_Tiers":
        """The tiers of this process: after a fork, locks and sockets of the parent are left alone."""
        if self._process != os.getpid():
            self._tiers, self._process = _Tiers(self.cold, self.cache), os.getpid()
        return self._tiers


class _Tiers:
    """What lives in one process."""

    def __init__(self, cold: BlockStore, cache: CacheConfig) -> None:
        self.cold, self.unit = cold, cache.unit
        self.codec = BlockCodec(cold.schema)
        self.dataset = dataset_name(cold)
        room = 0 if cache.url is None else cache.capacity
        self.memory: Memory
        if cache.policy == "serve":
            self.memory = ServeMemory(room, cache.ttl_s)
        else:
            self.memory = TrainMemory(room, reused=cache.unit == "group")
        self.shared: GuardedTier | None = open_tier(cache)
        self.tally = Tally()
        self.units: SingleFlight[pa.RecordBatch] = SingleFlight(partial(_keep, self.memory))
        self.blocks: SingleFlight[pa.RecordBatch] = SingleFlight(lambda block, batch: None)
        self.announced: dict[bytes, list[int]] = {}
        self.prefetcher = Prefetcher(self, _Tiers.bring)
        self.stored_at = time.monotonic()

    def read_rows(self, indices: np.ndarray) -> pa.Table:
        if not len(indices):
            return self.codec.finish(self.codec.plain.empty_table())
        numbers, places = np.unique(self._units_of(indices), return_inverse=True)
        start = time.perf_counter()
        loads = _Loads()
        landed = self.units.fetch(numbers.tolist(), self.memory.get, lambda mine: self._load(mine, loads))
        spent = time.perf_counter() - start
        with self.units.lock:
            self._fulfil(_name(indices))
        self.tally.add(
            requests=1,
            rows=len(indices),
            lookups=len(numbers),
            memory_hits=landed.ready,
            shared_hits=loads.shared_hits,
            waits=landed.waited,
            misses=loads.misses,
            memory_s=0.0 if landed.waited or loads.any else spent,
        )
        if time.monotonic() > self.stored_at + STORE_EVERY_S:
            self.store_counters()
        return self.codec.finish(self._gather(indices, numbers, places, landed.values))

    def prefetch(self, indices: np.ndarray) -> None:
        if not self.memory.capacity and self.shared is None:
            return  # there is nowhere to bring them
        if not len(indices):
            return
        request = _name(indices)
        numbers = list(dict.fromkeys(self._units_of(indices).tolist()))  # in the order of reading
        if self._announce(request, numbers) and not self.prefetcher.ask(request):
            self.tally.add(dropped=1)

    def _announce(self, request: bytes, numbers: list[int]) -> bool:
        """Tells memory what a request will need, once a request; returns whether anything of it must be brought."""
        with self.units.lock:
            if request not in self.announced:
                self.announced[request] = numbers
                for number in numbers:
                    self.memory.expect(number)
            if len(self.announced) > ANNOUNCED:
                self._fulfil(next(iter(self.announced)))
            return any(self.memory.peek(number) is None for number in numbers)

    def _fulfil(self, request: bytes) -> None:
        for number in self.announced.pop(request, ()):
            self.memory.fulfil(number)

    def bring(self, request: bytes) -> None:
        """Loads units that are not in memory, a few at a time; none for a request that was made meanwhile."""
        with self.units.lock:
            numbers = self.announced.get(request, [])
        for start in range(0, len(numbers), AHEAD):
            loads = _Loads()
            if self.memory.crowded and (self.shared is None or not self.shared.writable):
                return self.tally.add(dropped=1)  # too far ahead for the room that there is
            some = numbers[start : start + AHEAD]
            self.units.fetch(some, self.memory.peek, lambda mine, loads=loads: self._load(mine, loads))
            self.tally.add(prefetched=loads.shared_hits + loads.misses)

    def counters(self) -> CacheCounters:
        broken = self.shared is not None and self.shared.breaker.open
        return self.tally.read(memory_bytes=self.memory.used, breaker_open=int(broken))

    def store_counters(self) -> None:
        self.stored_at = time.monotonic()
        if self.shared is not None:
            counts = self.tally.take_unstored()
            if counts and not self.shared.add_counts(self.dataset, counts):
                self.tally.give_back(counts)

    def _units_of(self, indices: np.ndarray) -> np.ndarray:
        return self._blocks_of(indices) if self.unit == "group" else indices

    def _blocks_of(self, indices: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.cold.starts, indices, side="right") - 1

    def _rows_in(self, number: int) -> int:
        return int(self.cold.starts[number + 1] - self.cold.starts[number]) if self.unit == "group" else 1

    def _gather(
        self, indices: np.ndarray, numbers: np.ndarray, places: np.ndarray, batches: dict[int, pa.RecordBatch]
    ) -> pa.Table:
        """Picks rows out of units; `places` is the unit of each index, as a position in `numbers`."""
        if self.unit == "row":
            found = [batches[number] for number in indices.tolist()]
        else:
            owners = numbers[places]
            inside = (indices - self.cold.starts[owners]).tolist()
            found = [batches[number].slice(row, 1) for number, row in zip(owners.tolist(), inside, strict=True)]
        return pa.Table.from_batches(found, self.codec.plain).combine_chunks()  # copies each row once

    def _load(self, mine: list[int], loads: "_Loads") -> dict[int, pa.RecordBatch]:
        """Gets units that are not in memory, and stores those that the shared tier lacks."""
        found = self._from_shared(mine)
        missing = [number for number in mine if number not in found]
        granted, others = self._claim(missing)
        loads.misses = len(granted)
        found |= self._read_through(granted)
        found |= self._wait_for(others)
        rest = [number for number in others if number not in found]
        loads.misses += len(rest)
        found |= self._read_through(rest)
        loads.shared_hits = len(mine) - loads.misses
        return found

    def _claim(self, missing: list[int]) -> tuple[list[int], list[int]]:
        """Splits what the shared tier lacks into what this process reads, and what another one is reading now."""
        if self.shared is None or not missing:
            return missing, []
        claims = self.shared.lease([self._key(number) for number in missing])
        pairs = list(zip(missing, claims, strict=True))
        return [number for number, mine in pairs if mine], [number for number, mine in pairs if not mine]

    def _read_through(self, numbers: list[int]) -> dict[int, pa.RecordBatch]:
        """Reads from the cold store into the shared tier, and ends the claims."""
        if not numbers:
            return {}
        try:
            found = self._from_cold(numbers)
            self._to_shared(found)
        finally:
            if self.shared is not None:
                self.shared.release([self._key(number) for number in numbers])
        return found

    def _wait_for(self, others: list[int]) -> dict[int, pa.RecordBatch]:
        """Takes what other processes store within a moment; they may be slow, or gone."""
        found: dict[int, pa.RecordBatch] = {}
        end = time.monotonic() + LEASE_WAIT_S
        while others and self.shared is not None and time.monotonic() < end:
            time.sleep(LEASE_POLL_S)
            # Claims are asked for first: one that has ended meanwhile has stored its value before.
            busy = self.shared.leased([self._key(number) for number in others])
            found |= self._from_shared(others)
            others = [n for n, claimed in zip(others, busy, strict=True) if claimed and n not in found]
        return found

    def _key(self, number: int) -> bytes:
        return key_of(self.dataset, self.unit, number)

    def _from_shared(self, numbers: Sequence[int]) -> dict[int, pa.RecordBatch]:
        if self.shared is None or not numbers:
            return {}
        start = time.perf_counter()
        keys = [self._key(number) for number in numbers]
        found, rejected = {}, 0
        for number, key, value in zip(numbers, keys, self.shared.get_many(keys), strict=True):
            batch = None if value is None else self.codec.decode(key, value, self._rows_in(number))
            rejected += value is not None and batch is None
            if batch is not None:
                found[number] = batch
        if rejected:
            self.shared.rejected()
        self.tally.add(rejected=rejected, shared_s=time.perf_counter() - start)
        return found

    def _to_shared(self, batches: dict[int, pa.RecordBatch]) -> None:
        if self.shared is not None and self.shared.writable:
            start = time.perf_counter()
            keys = {number: self._key(number) for number in batches}
            self.shared.put_many({keys[n]: self.codec.encode(keys[n], batch) for n, batch in batches.items()})
            self.tally.add(shared_s=time.perf_counter() - start)

    def _from_cold(self, numbers: list[int]) -> dict[int, pa.RecordBatch]:
        blocks = numbers if self.unit == "group" else np.unique(self._blocks_of(np.array(numbers))).tolist()
        batches = self.blocks.fetch(blocks, lambda block: None, self._read_blocks).values
        if self.unit == "group":
            return batches
        rows = {}
        for number, block in zip(numbers, self._blocks_of(np.array(numbers)).tolist(), strict=True):
            rows[number] = _own(batches[block].slice(number - int(self.cold.starts[block]), 1))
        return rows

    def _read_blocks(self, blocks: list[int]) -> dict[int, pa.RecordBatch]:
        start = time.perf_counter()
        batches = [_own(self.codec.normalize(batch)) for batch in self.cold.read_blocks(blocks)]
        for block, batch in zip(blocks, batches, strict=True):
            want = int(self.cold.starts[block + 1] - self.cold.starts[block])
            if batch.num_rows != want:
                raise UserError(
                    f"block {block} has {batch.num_rows} rows where {want} were counted: the files have changed since "
                    "they were opened; start again, or finish writing first"
                )
        spent = time.perf_counter() - start
        self.tally.add(cold_blocks=len(blocks), cold_bytes=sum(batch.nbytes for batch in batches), cold_s=spent)
        return dict(zip(blocks, batches, strict=True))


class _Loads:
    """What one request had to load, by origin."""

    def __init__(self) -> None:
        self.shared_hits = self.misses = 0

    @property
    def any(self) -> bool:
        return bool(self.shared_hits or self.misses)


def _name(indices: np.ndarray) -> bytes:
    """Names a request by its rows."""
    return indices.astype(np.int64, copy=False).tobytes()


def _own(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A batch in memory of its own: a slice would hold, and be charged for, all of what it was cut from."""
    if batch.get_total_buffer_size() <= batch.nbytes + 64 * batch.num_columns:
        return batch
    return pa.ipc.read_record_batch(batch.serialize(), batch.schema)


def _keep(memory: Memory, number: int, batch: pa.RecordBatch) -> None:
    memory.put(number, batch, max(1, batch.get_total_buffer_size()))
