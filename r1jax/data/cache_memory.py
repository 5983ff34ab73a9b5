"""Process memory of bounded size: which values stay, in training and in serving."""

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

CHURN = 0.4
"""Share of recent misses on what was let go shortly before, above which what is in use gets more room."""
MEMORY_OF_CHURN = 200
"""Number of misses over which that share is taken."""
SHORTLY = 64
"""Least number of lookups that count as shortly after; a third of the values held, where that is more."""
SMALL = 0.1
"""Share of the bytes where S3-FIFO tries newcomers."""


@runtime_checkable
class Memory(Protocol):
    """Values by key within a number of bytes; not safe for threads, the store that owns it has a lock."""

    capacity: int
    """Bytes that it may hold."""
    used: int
    """Bytes held now."""

    def get(self, key: Hashable) -> Any | None:
        """Finds a value; None if it is not there."""
        ...

    def expect(self, key: Hashable) -> None:
        """Hears that a value will be asked for soon, once more."""
        ...

    def fulfil(self, key: Hashable) -> None:
        """Hears that one request that was announced has been made, or will not be."""
        ...

    def peek(self, key: Hashable) -> Any | None:
        """Finds a value without taking that for a use of it."""
        ...

    @property
    def crowded(self) -> bool:
        """Whether there is no room for more that is expected."""
        ...

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Offers a value of so many bytes, which may be refused or push others out."""
        ...


class TrainMemory:
    """Admits until it is full and then keeps that, beside just as much room as the blocks in use need.

    Where every value is used once an epoch in a new order, no cache without foresight beats one that never evicts: of C
    values that stay, each is a hit in every epoch. Row groups read in windows are used many times within a window, so a
    part of the room, `reserve`, goes by last use. It starts at nothing and grows for what is expected, and while values
    are asked for again shortly after they were let go.
    """

    def __init__(self, capacity: int, reused: bool = True) -> None:
        """Starts empty.

        Args:
          capacity: Bytes that it may hold.
          reused: Whether a value serves several requests of an epoch (a row group does, a row does not).
        """
        self.capacity = capacity
        self._reused = reused
        self.reserve = 0
        self.used = 0
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._recent: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._awaited: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._expected: Counter[Hashable] = Counter()  # how often each was announced and not yet asked for
        self._ghosts: OrderedDict[Hashable, int] = OrderedDict()  # the lookup after which each was let go
        self._kept_bytes = 0
        self._awaited_bytes = 0
        self._lookups = 0
        self._churn = 0.0

    def get(self, key: Hashable) -> Any | None:
        """Finds a value.

        Args:
          key: Its name.

        Returns:
          The value, or None.
        """
        self._lookups += 1
        for part in (self._awaited, self._recent):
            if key in part:
                part.move_to_end(key)
        return self.peek(key)

    def expect(self, key: Hashable) -> None:
        """Keeps a value, which may be on its way yet, until `fulfil` was called as often.

        Args:
          key: Its name.
        """
        self._expected[key] += 1
        if key in self._recent:
            self._awaited[key] = self._recent.pop(key)
            self._awaited_bytes += self._awaited[key][1]

    def fulfil(self, key: Hashable) -> None:
        """Takes back one `expect`.

        Args:
          key: Its name.
        """
        self._expected[key] -= 1
        if self._expected[key] <= 0:
            del self._expected[key]
            if key in self._awaited:
                self._recent[key] = self._awaited.pop(key)
                self._awaited_bytes -= self._recent[key][1]

    def peek(self, key: Hashable) -> Any | None:
        """Finds a value without taking that for a use of it.

        Args:
          key: Its name.

        Returns:
          The value, or None.
        """
        for part in (self._kept, self._awaited, self._recent):
            if key in part:
                return part[key][0]
        return None

    @property
    def crowded(self) -> bool:
        """Whether expected values take all the room, so that one more would push out one that is needed sooner."""
        return self._awaited_bytes * (1 + 1 / max(1, len(self._awaited))) > self.capacity

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Takes a value in, if only for a while.

        Args:
          key: Its name.
          value: Anything.
          size: Its bytes.
        """
        if size > self.capacity or any(key in part for part in (self._kept, self._recent, self._awaited)):
            return
        again = self._lookups - self._ghosts.pop(key, -math.inf) <= self._horizon
        self._churn += (again - self._churn) / MEMORY_OF_CHURN
        if again and self._reused and self._churn > CHURN:
            self.reserve = min(self.reserve + size, self.capacity)
        self.used += size
        if self._kept_bytes + size <= self.capacity - self.reserve and self.used <= self.capacity:
            self._kept[key] = value, size
            self._kept_bytes += size
        elif key in self._expected:
            self._awaited[key] = value, size
            self._awaited_bytes += size
        else:
            self._recent[key] = value, size
        while self.used > self.capacity:
            self._let_go()

    @property
    def _horizon(self) -> int:
        return max(SHORTLY, (len(self._kept) + len(self._recent)) // 3)

    def _let_go(self) -> None:
        transient = self.used - self._kept_bytes
        if self._recent and (transient > self.reserve or not self._kept):
            key, (_, size) = self._recent.popitem(last=False)
            self._ghosts[key] = self._lookups
            while self._lookups - next(iter(self._ghosts.values())) > self._horizon:
                self._ghosts.popitem(last=False)
        elif self._kept:  # the oldest of what was kept was read the longest ago
            _, (_, size) = self._kept.popitem(last=False)
            self._kept_bytes -= size
            self.reserve = max(self.reserve, transient)
        else:
            _, (_, size) = self._awaited.popitem(last=False)
            self._awaited_bytes -= size
        self.used -= size


@dataclass(slots=True)
class _Entry:
    value: Any
    size: int
    expires: float
    hits: int = 0


class ServeMemory:
    """S3-FIFO (Yang et al., SOSP 2023) in bytes, with a time to live: popular values stay, single uses pass through."""

    def __init__(self, capacity: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.capacity = capacity
        self.used = 0
        self._ttl_s, self._clock = ttl_s, clock
        self._small: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._main: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._ghosts: OrderedDict[Hashable, None] = OrderedDict()
        self._small_bytes = 0

    def get(self, key: Hashable) -> Any | None:
        """Finds a value that has not expired.

        Args:
          key: Its name.

        Returns:
          The value, or None.
        """
        return self._find(key, 1)

    def expect(self, key: Hashable) -> None:
        """Takes no note: popularity is what was asked for, not what was announced.

        Args:
          key: Its name.
        """

    def fulfil(self, key: Hashable) -> None:
        """Has nothing to take back.

        Args:
          key: Its name.
        """

    def peek(self, key: Hashable) -> Any | None:
        """Finds a value without taking that for a sign of its popularity.

        Args:
          key: Its name.

        Returns:
          The value, or None.
        """
        return self._find(key, 0)

    @property
    def crowded(self) -> bool:
        """Never: what is expected takes its chance with the rest."""
        return False

    def _find(self, key: Hashable, hits: int) -> Any | None:
        for queue in (self._small, self._main):
            entry = queue.get(key)
            if entry is not None:
                if self._clock() >= entry.expires:
                    self._remove(queue, key)
                    return None
                entry.hits = min(entry.hits + hits, 3)
                return entry.value
        return None

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Takes a value in and lets the least popular go.

        Args:
          key: Its name.
          value: Anything.
          size: Its bytes.
        """
        if size > self.capacity or key in self._small or key in self._main:
            return
        while self.used + size > self.capacity:
            self._let_go()
        entry = _Entry(value, size, self._clock() + self._ttl_s)
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = entry
        else:
            self._small[key] = entry
            self._small_bytes += size
        self.used += size

    def _remove(self, queue: OrderedDict[Hashable, _Entry], key: Hashable) -> _Entry:
        entry = queue.pop(key)
        self.used -= entry.size
        self._small_bytes -= entry.size if queue is self._small else 0
        return entry

    def _let_go(self) -> None:
        """Lets one value go, or moves one on."""
        queue = self._small if self._small_bytes > SMALL * self.capacity or not self._main else self._main
        key = next(iter(queue))
        entry = self._remove(queue, key)
        if entry.hits and queue is self._small:
            self._main[key], entry.hits = entry, 0
            self.used += entry.size
        elif entry.hits:
            self._main[key], entry.hits = entry, entry.hits - 1
            self.used += entry.size
        elif queue is self._small:
            self._ghosts[key] = None
            while len(self._ghosts) > max(1, len(self._main)):
                self._ghosts.popitem(last=False)
