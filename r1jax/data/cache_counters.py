"""What a cache has done, in numbers."""

import threading
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class CacheCounters(NamedTuple):
    """Counts since the store was opened, over all threads of one process; a unit is a row group or a row.

    `lookups` is the sum of `memory_hits`, `shared_hits`, `waits` and `misses`: what readers found when they asked.
    Units that `prefetch` brought before they were asked for are hits then, and count in `prefetched`.
    """

    requests: int = 0
    """Calls of `read_rows`."""
    rows: int = 0
    """Rows given."""
    lookups: int = 0
    """Units asked for, each once a request."""
    memory_hits: int = 0
    """Found in the memory of the process."""
    shared_hits: int = 0
    """Found in LMDB or Redis."""
    waits: int = 0
    """Being read by another thread (`prefetch`, say) at that moment."""
    misses: int = 0
    """Read from the cold store."""
    prefetched: int = 0
    """Brought into memory ahead of any request."""
    dropped: int = 0
    """Calls of `prefetch` that found too many others waiting, or memory full of what is needed sooner."""
    rejected: int = 0
    """Values of LMDB or Redis that were damaged, cut or another's, and so were read from the cold store."""
    cold_blocks: int = 0
    """Blocks read from the cold store."""
    cold_bytes: int = 0
    """Their size in memory, decoded."""
    memory_s: float = 0.0
    """Seconds of looking up in memory, over all threads."""
    shared_s: float = 0.0
    """Seconds of waiting for LMDB or Redis, over all threads."""
    cold_s: float = 0.0
    """Seconds of waiting for the cold store, over all threads."""
    memory_bytes: int = 0
    """Bytes held in the memory of the process now."""
    breaker_open: int = 0
    """1 while LMDB or Redis is left alone because it fails."""

    def figures(self, prefix: str) -> dict[str, float]:
        """All of them by name, and `hit_rate`, for logs.

        Args:
          prefix: Put before each name.

        Returns:
          The numbers; none where nothing was asked for.
        """
        if not self.lookups:
            return {}
        named = self._asdict() | {"hit_rate": self.hit_rate}
        return {f"{prefix}{name}": float(value) for name, value in named.items()}

    @property
    def hit_rate(self) -> float:
        """Share of lookups that found their unit in a tier; NaN before the first."""
        return (self.memory_hits + self.shared_hits) / self.lookups if self.lookups else float("nan")


STORED = ("requests", "rows", "lookups", "memory_hits", "shared_hits", "waits", "misses", "rejected", "cold_blocks",
          "cold_bytes")  # fmt: skip
"""Counters that readers add up in the shared tier, for `r1jax data stats`."""


class Tally:
    """Counters that several threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int | float] = dict.fromkeys(CacheCounters._fields, 0) | {
            name: 0.0 for name in CacheCounters._fields if name.endswith("_s")
        }
        self._stored: dict[str, int | float] = dict.fromkeys(STORED, 0)

    def add(self, **counts: int | float) -> None:
        """Adds to some counters.

        Args:
          **counts: What to add, by name.
        """
        with self._lock:
            for name, value in counts.items():
                self._counts[name] += value

    def read(self, **now: int) -> CacheCounters:
        """Gives all counters.

        Args:
          **now: Values of those that are states, not counts.

        Returns:
          A copy.
        """
        with self._lock:
            return CacheCounters(**(self._counts | now))

    def take_unstored(self) -> dict[str, float]:
        """Gives what has been counted since the last call, and takes it as stored.

        Returns:
          Counts by name, those that have grown.
        """
        with self._lock:
            grown = {name: float(self._counts[name] - self._stored[name]) for name in STORED}
            self._stored = {name: self._counts[name] for name in STORED}
        return {name: value for name, value in grown.items() if value}

    def give_back(self, counts: dict[str, float]) -> None:
        """Undoes `take_unstored`, where storing failed.

        Args:
          counts: What it gave.
        """
        with self._lock:
            for name, value in counts.items():
                self._stored[name] -= value


def total(counted: Iterable[Mapping[str, int | float]]) -> CacheCounters:
    """Adds up the counters of several processes.

    Args:
      counted: By name, of each process.

    Returns:
      The sums; of `breaker_open`, the number of processes that leave the shared tier alone.
    """
    sums = dict.fromkeys(CacheCounters._fields, 0.0)
    for counts in counted:
        for name in sums:
            sums[name] += counts.get(name, 0.0)
    return CacheCounters(**{name: value if name.endswith("_s") else int(value) for name, value in sums.items()})


def line(c: CacheCounters) -> str:
    """Says in one line where rows came from.

    Args:
      c: The counters.

    Returns:
      The share of each tier, and what the cold store had to read.
    """
    found = [("memory", c.memory_hits), ("LMDB or Redis", c.shared_hits)]
    hits = ", ".join(f"{share / c.lookups:.1%} in {name}" for name, share in found)
    return (
        f"cache: {c.lookups:,} lookups, {hits}, {c.waits / c.lookups:.1%} on their way, "
        f"{c.misses / c.lookups:.1%} from the cold store, which read {c.cold_bytes / 2**20:,.1f} MiB"
    )


def table(counters: CacheCounters) -> str:
    """Prints counters for people.

    Args:
      counters: Of one process.

    Returns:
      One line a tier, and one of what else happened.
    """
    c = counters
    total = max(c.lookups, 1)
    lines = [f"{'tier':8} {'found':>12} {'share':>8} {'seconds':>9}"]
    for name, found, seconds in (
        ("memory", c.memory_hits, c.memory_s),
        ("shared", c.shared_hits, c.shared_s),
        ("waited", c.waits, 0.0),
        ("cold", c.misses, c.cold_s),
    ):
        lines.append(f"{name:8} {found:12,} {found / total:8.2%} {seconds:9.2f}")
    lines.append(
        f"{c.requests:,} requests, {c.rows:,} rows, {c.lookups:,} lookups, {c.prefetched:,} units ahead of them, "
        f"{c.cold_blocks:,} cold blocks of {c.cold_bytes / 2**20:,.1f} MiB, {c.rejected:,} values rejected, "
        f"{c.memory_bytes / 2**20:,.1f} MiB in memory{', shared tier left alone' if c.breaker_open else ''}"
    )
    return "\n".join(lines)
