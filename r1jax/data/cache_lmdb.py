"""LMDB as a shared tier: one file that all processes of a machine read without locks."""

import contextlib
import fcntl
import json
import math
import os
import struct
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from r1jax.data.cache_redis import counters_key
from r1jax.data.cache_values import NAMESPACE, NotStored
from r1jax.errors import UserError

EXPIRES = struct.Struct("<d")
"""Before each value: when it expires, in seconds since 1970."""
WAIT_S = 0.25
"""Most that a writer waits for another one, who may have been stopped."""
PURGE_S = 60.0
"""Least time between two searches for expired values."""
STEP = 16
"""Values deleted in one transaction, which needs free pages as well."""
PURGED = f"{NAMESPACE}:purged".encode()
READERS = 1024


class LmdbTier:
    """A folder with an LMDB file; picklable, opened when it is first asked, once a process."""

    def __init__(self, folder: str, capacity: int, ttl_s: float) -> None:
        """Remembers where.

        Args:
          folder: Is made when needed.
          capacity: Bytes that the file may have.
          ttl_s: Seconds until a value expires.

        Raises:
          UserError: The library is not installed.
        """
        self._lmdb = lmdb_library()
        self.name = f"lmdb:{folder}"
        self.folder, self.capacity, self.ttl_s = folder, capacity, ttl_s
        self._file: _OpenFile | None = None
        self._purged = -PURGE_S

    def __reduce__(self) -> tuple[Any, ...]:
        """Only what was asked for travels to another process."""
        return LmdbTier, (self.folder, self.capacity, self.ttl_s)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Finds values that have not expired.

        Args:
          keys: Their names.

        Returns:
          What the file says that they are.

        Raises:
          Exception: The file cannot be read.
        """
        now = time.time()
        with self.environment().begin(buffers=True) as reader:
            return [_alive(reader.get(key), now) for key in keys]

    def put_many(self, values: Mapping[bytes, bytes]) -> None:
        """Stores values; where there is no room, expired ones make some, and others stay.

        Args:
          values: By key.

        Raises:
          NotStored: The file is full, or another process holds it.
          Exception: It cannot be written.
        """
        expires = EXPIRES.pack(time.time() + self.ttl_s)
        stored = {key: expires + value for key, value in values.items()}
        with self._writing() as environment:
            try:
                self._store(environment, stored)
            except self._lmdb.MapFullError:
                if not self._purge(environment):
                    raise NotStored(f"its {self.capacity} bytes are full") from None
                with self._full_is_no_failure():
                    self._store(environment, stored)

    def lease(self, keys: Sequence[bytes]) -> list[bool]:
        """Grants everything: the processes of one machine read a block twice rather than wait for each other.

        Args:
          keys: Names of values.

        Returns:
          True for each.
        """
        return [True] * len(keys)

    def leased(self, keys: Sequence[bytes]) -> list[bool]:
        """Says that nothing is claimed.

        Args:
          keys: Names of values.

        Returns:
          False for each.
        """
        return [False] * len(keys)

    def release(self, keys: Sequence[bytes]) -> None:
        """Has nothing to end.

        Args:
          keys: Names of values.
        """

    def add_counts(self, dataset: str, counts: Mapping[str, float]) -> None:
        """Adds to the counters of a dataset.

        Args:
          dataset: Its name.
          counts: What to add.

        Raises:
          NotStored: The file is full, or another process holds it.
          Exception: It cannot be written.
        """
        key = counters_key(dataset)
        with self._writing() as environment, self._full_is_no_failure(), environment.begin(write=True) as writer:
            total = json.loads(writer.get(key) or b"{}")
            for name, value in counts.items():
                total[name] = total.get(name, 0) + value
            writer.put(key, json.dumps(total).encode())

    def environment(self) -> Any:
        """The open file (`lmdb.Environment`), shared by all tiers of this process on the same folder."""
        if self._file is None:
            self._file = _opened(self._lmdb, Path(self.folder), self.capacity)
        return self._file.environment

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Any]:
        """Takes the right to write, for which LMDB itself would wait without end behind a stopped process."""
        environment = self.environment()
        assert self._file is not None
        if not self._file.turn.acquire(timeout=WAIT_S):
            raise NotStored("another thread holds it")
        try:
            with self._file.lock.open("ab") as lock:
                _lock_within(lock.fileno(), WAIT_S)
                try:
                    yield environment
                finally:
                    fcntl.flock(lock, fcntl.LOCK_UN)  # a process forked meanwhile has this file open as well
        finally:
            self._file.turn.release()

    @contextlib.contextmanager
    def _full_is_no_failure(self) -> Iterator[None]:
        try:
            yield
        except self._lmdb.MapFullError:
            raise NotStored(f"its {self.capacity} bytes are full") from None

    def _store(self, environment: Any, stored: Mapping[bytes, bytes]) -> None:
        with environment.begin(write=True) as writer:
            for key, value in stored.items():
                writer.put(key, value)

    def _purge(self, environment: Any) -> bool:
        """Deletes what has expired, whatever data set it is of; False if that made no room."""
        now = time.monotonic()
        if now < self._purged + PURGE_S:
            return False
        self._purged = now
        today = time.time()
        with environment.begin(buffers=True) as reader:
            dead = [bytes(key) for key, value in reader.cursor() if _expired(key, value, today)]
        try:
            for start in range(0, len(dead), STEP):
                with environment.begin(write=True) as writer:
                    for key in dead[start : start + STEP]:
                        writer.delete(key)
            with environment.begin(write=True) as writer:  # pages are free again one transaction after the deletion
                writer.put(PURGED, EXPIRES.pack(math.inf))
        except self._lmdb.MapFullError:
            return False
        return bool(dead)


def lmdb_library() -> Any:
    """Imports lmdb, an extra of the package.

    Returns:
      The module.

    Raises:
      UserError: It is not installed.
    """
    try:
        import lmdb
    except ModuleNotFoundError:
        raise UserError("an LMDB cache needs lmdb: pip install 'r1jax[cache]'") from None
    return lmdb


class _OpenFile:
    """LMDB forbids opening a file twice in a process, and using one over a fork."""

    def __init__(self, lmdb: Any, folder: Path, capacity: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Without the last sync a power cut may lose the newest values, but never the file.
        self.environment = lmdb.open(str(folder), map_size=capacity, metasync=False, max_readers=READERS)
        self.environment.reader_check()
        self.lock = folder / "write.lock"
        self.turn = threading.Lock()


_OPEN: "weakref.WeakValueDictionary[tuple[int, str], _OpenFile]" = weakref.WeakValueDictionary()
_OPENING = threading.Lock()


def _opened(lmdb: Any, folder: Path, capacity: int) -> _OpenFile:
    name = os.getpid(), str(folder.resolve())
    with _OPENING:
        found = _OPEN.get(name)
        if found is None:
            found = _OPEN[name] = _OpenFile(lmdb, folder, capacity)
        return found


def _lock_within(file: int, seconds: float) -> None:
    """Waits for a file lock, which ends with the process that holds it."""
    end = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise NotStored("another process is writing") from None
            time.sleep(0.005)


def _alive(value: Any, now: float) -> bytes | None:
    """Copies a value out of the file, unless it has expired."""
    if value is None or len(value) < EXPIRES.size or EXPIRES.unpack_from(value)[0] <= now:
        return None
    return bytes(value[EXPIRES.size :])


def _expired(key: Any, value: Any, now: float) -> bool:
    """Whether a value is past its time; counters stay."""
    return not bytes(key).endswith(b":counters") and _alive(value[: EXPIRES.size], now) is None
