"""Redis as a shared tier: pipelined, bounded in time, and never trusted."""

import os
import threading
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from r1jax.data.cache_values import NAMESPACE, NotStored
from r1jax.errors import UserError

TIMEOUT_S = 0.25
"""Most that connecting, or waiting for the next bytes, may take."""
DEADLINE_S = 2.0
"""Most that one round trip may take, however slowly bytes trickle in."""
KEYS = 64
"""Most values in one round trip."""
BYTES = 2**23
"""About how many bytes are sent in one round trip."""
LARGEST = 2**27
"""Larger values are left to the cold store (Redis itself takes up to 512 MiB)."""
LEASE_MS = 2000
JITTER = 0.1


class RedisTier:
    """A Redis server, or a cluster of them; picklable, connects when it is first asked."""

    def __init__(self, url: str, ttl_s: float) -> None:
        """Reads the URL.

        Args:
          url: redis://, rediss://, unix://, redis+cluster:// or rediss+cluster://, with options of redis-py after `?`.
          ttl_s: Seconds until a value expires.

        Raises:
          UserError: redis-py is not installed, the password's variable is not set, or an option is wrong.
        """
        try:
            import redis  # an extra of the package, and slow to import
        except ModuleNotFoundError:
            raise UserError("a Redis cache needs redis-py: pip install 'r1jax[cache]'") from None
        self.url, self.ttl_s = url, ttl_s
        parts = urlsplit(url)
        self.name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        self._cluster = parts.scheme.endswith("+cluster")
        self._address = _with_secret(self.name, url.replace("+cluster", "", 1) if self._cluster else url)
        try:
            redis.connection.parse_url(self._address)
        except ValueError as error:
            raise UserError(f"cache {self.name}: {error}") from None
        self._redis = redis
        self._lock = threading.Lock()
        self._connected: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Only what was asked for travels to another process."""
        return RedisTier, (self.url, self.ttl_s)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Finds values.

        Args:
          keys: Their names.

        Returns:
          What the server says that they are.

        Raises:
          Exception: The server fails, or answers anything but one value a key.
        """
        found: list[bytes | None] = []
        for start in range(0, len(keys), KEYS):
            some = list(keys[start : start + KEYS])
            with self._deadline() as client:
                answer = client.mget_nonatomic(some) if self._cluster else client.mget(some)
            if len(answer) != len(some) or not all(value is None or type(value) is bytes for value in answer):
                raise ValueError("the answer to MGET is not one value a key")
            found += answer
        return found

    def put_many(self, values: Mapping[bytes, bytes]) -> None:
        """Stores values with a time to live.

        Args:
          values: By key.

        Raises:
          NotStored: The server refuses (its memory is full, it is a replica, the user may not write).
          Exception: It fails.
        """
        for some in _portions(values):
            with self._deadline():
                pipe = self.pipeline()
                for key, value in some:
                    pipe.set(key, value, px=max(1, round(1000 * jittered(key, self.ttl_s))))
                self._check(pipe.execute(raise_on_error=False), (True,))
        if any(len(value) > LARGEST for value in values.values()):
            raise NotStored(f"a block is larger than {LARGEST >> 20} MiB: write smaller row groups")

    def lease(self, keys: Sequence[bytes]) -> list[bool]:
        """Claims values for two seconds at most, so that a killed reader holds nobody up for long.

        Args:
          keys: Their names.

        Returns:
          Which of them nobody else claims.

        Raises:
          NotStored: The server refuses.
          Exception: It fails.
        """
        with self._deadline():
            pipe = self.pipeline()
            for key in keys:
                pipe.set(_lease_of(key), str(os.getpid()), nx=True, px=LEASE_MS)
            answers = pipe.execute(raise_on_error=False)
        self._check(answers, (True, None))
        return [bool(answer) for answer in answers]

    def leased(self, keys: Sequence[bytes]) -> list[bool]:
        """Asks whether claims still stand.

        Args:
          keys: Names of values.

        Returns:
          One answer a key.

        Raises:
          Exception: The server fails.
        """
        return [value is not None for value in self.get_many([_lease_of(key) for key in keys])]

    def release(self, keys: Sequence[bytes]) -> None:
        """Ends claims.

        Args:
          keys: What `lease` granted.

        Raises:
          Exception: The server fails.
        """
        with self._deadline():
            pipe = self.pipeline()
            for key in keys:
                pipe.delete(_lease_of(key))
            pipe.execute(raise_on_error=False)

    def add_counts(self, dataset: str, counts: Mapping[str, float]) -> None:
        """Adds to the counters of a dataset.

        Args:
          dataset: Its name.
          counts: What to add.

        Raises:
          NotStored: The server refuses.
          Exception: It fails.
        """
        with self._deadline():
            pipe = self.pipeline()
            for name, value in counts.items():
                pipe.hincrbyfloat(counters_key(dataset), name, value)
            self._check(pipe.execute(raise_on_error=False))

    def client(self) -> Any:
        """The client of redis-py, made on first use; a cluster's connects at once."""
        with self._lock:
            if self._connected is None:
                kind = self._redis.RedisCluster if self._cluster else self._redis.Redis
                never = self._redis.retry.Retry(self._redis.backoff.NoBackoff(), 0)  # the breaker tries again
                self._connected = kind.from_url(
                    self._address, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, retry=never
                )
                weakref.finalize(self, _cut, self._connected)
            return self._connected

    def pipeline(self) -> Any:
        """Starts one round trip of several commands, none of which waits for another."""
        client = self.client()
        return client.pipeline() if self._cluster else client.pipeline(transaction=False)

    @contextmanager
    def _deadline(self) -> Iterator[Any]:
        """Gives the client for one round trip, and cuts its connections when that takes too long."""
        client = self.client()
        watch = threading.Timer(DEADLINE_S, _cut, [client])
        watch.daemon = True
        watch.start()
        try:
            yield client
        finally:
            watch.cancel()

    def _check(self, answers: Sequence[Any], right: Sequence[Any] | None = None) -> None:
        """Sorts refusals, after which the server still serves what it has, from failures."""
        for answer in answers:
            if isinstance(answer, self._redis.ResponseError):
                raise NotStored(str(answer))
            if isinstance(answer, Exception):
                raise answer
            if right is not None and answer not in right:
                raise ValueError(f"the answer to SET is {answer!r:.40}")


def counters_key(dataset: str) -> bytes:
    """Names the counters that the readers of a dataset store.

    Args:
      dataset: Its name.

    Returns:
      The key of a hash.
    """
    return f"{NAMESPACE}:{dataset}:counters".encode()


def jittered(key: bytes, ttl_s: float) -> float:
    """Spreads times to live, so that values stored together do not expire together.

    Args:
      key: Decides the spread; no random number is drawn.
      ttl_s: Seconds.

    Returns:
      90 to 110 % of it.
    """
    return ttl_s * (1 + JITTER * (2 * zlib.crc32(b"ttl" + key) / 0xFFFFFFFF - 1))


def _lease_of(key: bytes) -> bytes:
    return key + b":lease"


def _cut(client: Any) -> None:
    """Closes sockets under a reader, which then fails at once."""
    nodes = client.get_nodes() if hasattr(client, "get_nodes") else ()
    for server in [node.redis_connection for node in nodes] or [client]:
        if server is not None:
            server.connection_pool.disconnect()


def _portions(values: Mapping[bytes, bytes]) -> Iterator[list[tuple[bytes, bytes]]]:
    """Cuts values into round trips, leaving out those that are too large."""
    some: list[tuple[bytes, bytes]] = []
    size = 0
    for key, value in values.items():
        if len(value) > LARGEST:
            continue
        if some and (len(some) == KEYS or size + len(value) > BYTES):
            yield some
            some, size = [], 0
        some.append((key, value))
        size += len(value)
    if some:
        yield some


def _with_secret(name: str, url: str) -> str:
    """Puts the password in the place of `$NAME`."""
    parts = urlsplit(url)
    if not (parts.password or "").startswith("$"):
        return url
    variable = parts.password[1:]
    secret = os.environ.get(variable)
    if secret is None:
        raise UserError(f"cache {name}: its password comes from the environment: set {variable}")
    login, _, host = parts.netloc.rpartition("@")
    user = login.partition(":")[0]
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(secret, safe='')}@{host}"))
