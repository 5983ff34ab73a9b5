"""Shared tiers of a cache behind a circuit breaker: what fails there costs time, never rows and never a run."""

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar, runtime_checkable

from r1jax.config import CacheConfig, Config
from r1jax.data.cache_lmdb import LmdbTier
from r1jax.data.cache_redis import RedisTier
from r1jax.data.cache_values import NotStored

T = TypeVar("T")


def cache_remarks(config: Config) -> list[str]:
    """Says that a shared cache is named in vain.

    Args:
      config: The experiment.

    Returns:
      A line, or none; of a folder of cases its reader says it, since that depends on the files.
    """
    url, generated = config.data.cache.url, config.data.path is None
    if url in (None, "memory") or (config.task.name == "medical" and not generated):
        return []
    what = "generated cases go" if generated else f"what the {config.task.name} task reads goes"
    return [f"note: data.cache.url is {url!r}, but {what} through no cache: leave it out"]


@runtime_checkable
class SharedTier(Protocol):
    """Bytes by key, shared by processes; any method may raise anything.

    Attributes:
      name: For messages, without secrets.
    """

    name: str

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Finds values, None for each that is not there."""
        ...

    def put_many(self, values: Mapping[bytes, bytes]) -> None:
        """Stores values; raises `NotStored` where there is no room."""
        ...

    def lease(self, keys: Sequence[bytes]) -> list[bool]:
        """Claims values that this process will read and store; False where another process is at it."""
        ...

    def leased(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether somebody still is at it."""
        ...

    def release(self, keys: Sequence[bytes]) -> None:
        """Ends claims."""
        ...

    def add_counts(self, dataset: str, counts: Mapping[str, float]) -> None:
        """Adds to the counters of a dataset that `r1jax data stats` prints."""
        ...


class Breaker:
    """Stops asking what has failed several times in a row, and lets one request try again after each pause."""

    def __init__(
        self, name: str, failures: int = 3, pause_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self._failures, self._pause_s, self._clock = failures, pause_s, clock
        self._lock = threading.Lock()
        self._row = 0
        self._again = 0.0

    @property
    def open(self) -> bool:
        """Whether requests are kept back."""
        return self._row >= self._failures

    def allows(self) -> bool:
        """Whether to ask now; while open, True for one caller after each pause."""
        with self._lock:
            if not self.open:
                return True
            now = self._clock()
            if now < self._again:
                return False
            self._again = now + self._pause_s
            return True

    def failed(self, error: BaseException) -> None:
        """Counts a failure.

        Args:
          error: Shown in the one line that is printed when the breaker opens.
        """
        with self._lock:
            self._row += 1
            self._again = self._clock() + self._pause_s
            opens = self._row == self._failures
        if opens:
            _say(
                f"cache {self.name} does not answer ({_told(error)}): rows come from the cold store meanwhile, it is "
                f"tried again every {self._pause_s:g} s"
            )

    def succeeded(self) -> None:
        """Counts an answer."""
        with self._lock:
            closes = self.open
            self._row = 0
        if closes:
            _say(f"cache {self.name} answers again")


class GuardedTier:
    """A shared tier whose failures are misses, each within the time limits of the tier itself."""

    def __init__(self, tier: SharedTier, breaker: Breaker, full_pause_s: float = 60.0) -> None:
        self.breaker = breaker
        self._tier = tier
        self._full_pause_s = full_pause_s
        self._writes_after = 0.0
        self._told_full = False
        self._told_rejected = False

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Finds values.

        Args:
          keys: Their names.

        Returns:
          The value of each key, None where it is missing or the tier fails.
        """
        nothing: list[bytes | None] = [None] * len(keys)
        return self._try(lambda: self._tier.get_many(keys), nothing, proves=True) if keys else nothing

    def put_many(self, values: Mapping[bytes, bytes]) -> bool:
        """Stores values if the tier takes them.

        Args:
          values: By key.

        Returns:
          Whether all are stored.
        """
        return self.writable and self._try(lambda: self._put(values), False, proves=True)

    @property
    def writable(self) -> bool:
        """False for a while after the tier was full."""
        return time.monotonic() >= self._writes_after

    def lease(self, keys: Sequence[bytes]) -> list[bool]:
        """Claims values; all are granted where the tier fails or is full, so that nobody waits for nothing.

        Args:
          keys: Their names.

        Returns:
          Which of them this process shall read.
        """
        granted = [True] * len(keys)
        return self._try(lambda: self._tier.lease(keys), granted) if self.writable else granted

    def leased(self, keys: Sequence[bytes]) -> list[bool]:
        """Asks whether claims still stand.

        Args:
          keys: Names of values.

        Returns:
          One answer a key; False where the tier fails.
        """
        return self._try(lambda: self._tier.leased(keys), [False] * len(keys))

    def release(self, keys: Sequence[bytes]) -> None:
        """Ends claims.

        Args:
          keys: What `lease` granted.
        """
        self._try(lambda: self._tier.release(keys), None)

    def rejected(self) -> None:
        """Hears that values did not verify; they are read from the cold store, and stored again, without harm."""
        if not self._told_rejected:
            self._told_rejected = True
            _say(
                f"cache {self.breaker.name} gave values that are damaged or another key's: such rows come from the "
                "cold store and are counted as rejected"
            )

    def add_counts(self, dataset: str, counts: Mapping[str, float]) -> bool:
        """Adds to the stored counters.

        Args:
          dataset: Name of the rows.
          counts: What to add.

        Returns:
          Whether they are stored.
        """

        def add() -> bool:
            self._tier.add_counts(dataset, counts)
            return True

        return self.writable and self._try(add, False)

    def _put(self, values: Mapping[bytes, bytes]) -> bool:
        self._tier.put_many(values)
        return True

    def _try(self, call: Callable[[], T], otherwise: T, proves: bool = False) -> T:
        """Calls if the breaker allows it; a tier is optional, so whatever it raises is counted and told, not passed.

        Only values that came or went (`proves`) show that the tier works.
        """
        if not self.breaker.allows():
            return otherwise
        try:
            answer = call()
        except NotStored as error:
            self._full(error)
            return otherwise
        except Exception as error:  # noqa: BLE001
            self.breaker.failed(error)
            return otherwise
        if proves:
            self.breaker.succeeded()
        return answer

    def _full(self, error: NotStored) -> None:
        """Stops writing for a while; said once, since a full cache is what the policy train ends in."""
        self._writes_after = time.monotonic() + self._full_pause_s
        if not self._told_full:
            self._told_full = True
            _say(f"cache {self.breaker.name} takes no more values ({_told(error)}): what it has is still read")


def open_tier(config: CacheConfig) -> GuardedTier | None:
    """Prepares the shared tier of a config; nothing is connected yet.

    Args:
      config: Its URL is valid.

    Returns:
      The tier; None where only process memory, or no cache at all, is asked for.

    Raises:
      UserError: The client library is not installed, or the password's variable is not set.
    """
    if config.url is None or config.url == "memory":
        return None
    tier: SharedTier
    if config.url.startswith("lmdb:"):
        tier = LmdbTier(config.url.removeprefix("lmdb:"), config.disk_capacity, config.ttl_s)
    else:
        tier = RedisTier(config.url, config.ttl_s)
    return GuardedTier(tier, Breaker(tier.name))


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:200]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
