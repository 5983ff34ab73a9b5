"""A cache that dies, hangs, empties, fills or lies: the rows stay right, the time bounded, and it is said once."""

import itertools
import random
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.config import CacheConfig
from r1jax.data import cache_redis
from r1jax.data.cache import Breaker, GuardedTier
from r1jax.data.tiered import TieredStore
from tests.data.services import free_port, start_redis
from tests.data.stores import MemoryStore, same

BOUND_S = 60.0
"""Far above three timeouts, and far below waiting once for something that never comes."""
SIZES = [8] * 32


def reader(url, fingerprint="5eed", **cache):
    """A store that keeps nothing in memory, so that every read asks the server."""
    return TieredStore(MemoryStore(SIZES, fingerprint), CacheConfig(url=url, **({"capacity": 1} | cache)))


def read(store, batches=30, seed=0):
    """Reads random rows and holds them against the truth; gives the seconds that it took."""
    rng = np.random.default_rng(seed)
    start = time.monotonic()
    for _ in range(batches):
        wanted = rng.integers(0, len(store), 12)
        same(store.read_rows(wanted), store.cold, wanted)
    return time.monotonic() - start


def lines(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.strip()]


def test_killed_and_back_again(patient, tmp_path, capsys):
    with start_redis(tmp_path) as server:
        store = reader(server.url)
        store._tiers.shared.breaker._pause_s = 0.1
        read(store)
        server.process.kill()
        server.process.wait()
        assert read(store) < BOUND_S
        (line,) = lines(capsys)
        assert line.startswith(f"cache {server.url} does not answer (")
        assert store.counters().breaker_open == 1
    with start_redis(tmp_path, port=server.port):
        time.sleep(0.15)
        read(store)
        hits = store.counters().shared_hits
        read(store)
        assert store.counters().shared_hits > hits
        assert lines(capsys) == [f"cache {server.url} answers again"]
        assert store.counters().breaker_open == 0


def test_paused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cache_redis, "TIMEOUT_S", 1.0)
    with start_redis(tmp_path) as server:
        store = reader(server.url)
        read(store)
        server.process.send_signal(signal.SIGSTOP)
        assert read(store) < BOUND_S
        server.process.send_signal(signal.SIGCONT)
        assert len(lines(capsys)) == 1


@pytest.mark.parametrize("unit", ["group", "row"])
def test_flushed_in_the_middle(patient, redis_server, capsys, unit):
    store = reader(redis_server.url, unit=unit)
    stop = threading.Event()

    def flush():
        with redis.Redis.from_url(redis_server.url) as client:
            while not stop.wait(0.005):
                client.flushall()

    thread = threading.Thread(target=flush)
    thread.start()
    try:
        assert read(store, 60) < BOUND_S
    finally:
        stop.set()
        thread.join()
    assert lines(capsys) == []
    assert store.counters().rejected == 0


def test_filled(patient, tmp_path, capsys):
    with start_redis(tmp_path, "--maxmemory", "2mb", "--maxmemory-policy", "noeviction") as server:
        store = reader(server.url)
        read(store, 10)
        with redis.Redis.from_url(server.url) as client, pytest.raises(redis.ResponseError):
            for number in itertools.count():
                client.set(f"other {number}", bytes(10_000))
        late = reader(server.url, "another")
        assert read(late) < BOUND_S
        (line,) = lines(capsys)
        assert "takes no more values" in line
        before = store.counters().shared_hits
        read(store)
        assert store.counters().shared_hits > before


@contextmanager
def lying_server(answer):
    """Accepts everybody; `answer(connection, stop)` speaks."""
    stop = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def talk(connection):
        with connection, suppress(OSError):
            answer(connection, stop)

    def accept():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=[connection], daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def noise(connection, stop):
    while connection.recv(65536) and not stop.is_set():
        connection.sendall(random.Random(0).randbytes(5000))


def type_bytes(connection, stop):
    chance = random.Random(1)
    while connection.recv(65536) and not stop.is_set():
        connection.sendall(bytes(chance.choice(b"+-:$*,#!=%~>_(") for _ in range(20)) + b"\r\n")


def wrong_counts(connection, stop):
    while connection.recv(65536) and not stop.is_set():
        connection.sendall(b"*2\r\n$1\r\na\r\n:5\r\n" * 50)


def trickle(connection, stop):
    connection.recv(65536)
    connection.sendall(b"$1000000\r\n")
    while not stop.wait(0.02):
        connection.sendall(b"x")


def silence(connection, stop):
    stop.wait(BOUND_S)


@pytest.mark.parametrize("answer", [noise, type_bytes, wrong_counts, trickle, silence])
def test_a_server_that_is_none(answer, capsys, monkeypatch):
    monkeypatch.setattr(cache_redis, "DEADLINE_S", 0.4)
    with lying_server(answer) as url:
        store = reader(url)
        assert read(store) < BOUND_S
        (line,) = lines(capsys)
        assert "does not answer" in line
        assert store.counters().shared_hits == 0


def test_the_values_of_other_keys(patient, redis_server, capsys):
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
        store = reader(redis_server.url)
        read(store)
        keys = sorted(key for key in client.scan_iter("*:group:*") if not key.endswith(b":lease"))
        values = client.mget(keys)
        client.mset(dict(zip(keys, values[1:] + values[:1], strict=True)))
    before = store.counters()
    assert read(store) < BOUND_S
    assert store.counters().rejected - before.rejected == len(keys)  # each was put right when it was read again
    (line,) = lines(capsys)
    assert "damaged or another key's" in line


def test_two_hundred_flipped_bits(patient, redis_server, capsys):
    chance = random.Random(0)
    store = reader(redis_server.url)
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
        same(store.read_rows(np.arange(256)), store.cold, range(256))
        keys = [key for key in client.scan_iter("*:group:*") if not key.endswith(b":lease")]
        for trial in range(200):
            key = chance.choice(keys)
            value = client.get(key)
            bit = chance.randrange(8 * len(value))
            client.setbit(key, bit, 1 - client.getbit(key, bit))
            block = int(key.rpartition(b":")[2])
            wanted = range(8 * block, 8 * block + 8)
            same(store.read_rows(np.array(wanted)), store.cold, wanted)
            assert store.counters().rejected == trial + 1
            assert client.get(key) == value
    assert len(lines(capsys)) == 1


class DictTier:
    """Values in a dict, which a test damages."""

    name = "dict"

    def __init__(self):
        self.values: dict[bytes, bytes] = {}

    def get_many(self, keys):
        return [self.values.get(key) for key in keys]

    def put_many(self, values):
        self.values |= values

    def lease(self, keys):
        return [True] * len(keys)

    def leased(self, keys):
        return [False] * len(keys)

    def release(self, keys):
        pass

    def add_counts(self, dataset, counts):
        pass


@settings(max_examples=150)
@given(st.data(), st.sampled_from(["group", "row"]))
def test_no_damage_becomes_a_row(data, unit):
    store = TieredStore(MemoryStore([3, 3]), CacheConfig(capacity=1, unit=unit))
    tier = DictTier()
    store._tiers.shared = GuardedTier(tier, Breaker("dict"))
    same(store.read_rows(np.arange(6)), store.cold, range(6))
    keys = sorted(tier.values)
    for _ in range(data.draw(st.integers(1, 4))):
        key = data.draw(st.sampled_from(keys))
        value = tier.values[key]
        kind = data.draw(st.sampled_from(["flip", "cut", "swap", "noise", "zero"]))
        if kind == "flip" and value:
            bit = data.draw(st.integers(0, 8 * len(value) - 1))
            value = bytearray(value)
            value[bit // 8] ^= 1 << bit % 8
        elif kind == "cut":
            value = value[: data.draw(st.integers(0, len(value)))]
        elif kind == "swap":
            value = tier.values[data.draw(st.sampled_from(keys))]
        elif kind == "noise":
            value = data.draw(st.binary(max_size=600))
        else:
            value = bytes(len(value))
        tier.values[key] = bytes(value)
    same(store.read_rows(np.arange(6)), store.cold, range(6))


def test_a_wrong_password_and_none_at_all(patient, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("R1JAX_TEST_SECRET", "wrong")
    with start_redis(tmp_path, "--requirepass", "right") as server:
        for url in (server.url, server.url.replace("://", "://:$R1JAX_TEST_SECRET@")):
            store = reader(url)
            assert read(store) < BOUND_S
            (line,) = lines(capsys)
            assert "AuthenticationError" in line and "wrong" not in line.split("(")[0]
        monkeypatch.setenv("R1JAX_TEST_SECRET", "right")
        store = reader(url)
        read(store)
        assert store.counters().shared_hits > 0
        assert lines(capsys) == []


def test_tls_to_a_plain_port(redis_server, capsys):
    store = reader(redis_server.url.replace("redis:", "rediss:"))
    assert read(store) < BOUND_S
    (line,) = lines(capsys)
    assert "does not answer" in line


def test_nobody_listens(capsys):
    url = f"redis://127.0.0.1:{free_port()}"
    store = reader(url)
    assert read(store) < BOUND_S
    (line,) = lines(capsys)
    assert line.startswith(f"cache {url} does not answer (ConnectionError: ")
    assert "rows come from the cold store meanwhile, it is tried again every 10 s" in line


def test_an_lmdb_folder_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    store = reader(f"lmdb:{tmp_path / 'file'}")
    assert read(store) < BOUND_S
    assert len(lines(capsys)) == 1


def test_an_lmdb_file_of_rubbish(tmp_path, capsys):
    (tmp_path / "data.mdb").write_bytes(random.Random(0).randbytes(100_000))
    store = reader(f"lmdb:{tmp_path}")
    assert read(store) < BOUND_S
    (line,) = lines(capsys)
    assert "does not answer" in line


def test_a_full_lmdb_folder(tmp_path, capsys):
    store = reader(f"lmdb:{tmp_path}", disk_capacity=50_000)
    assert read(store) < BOUND_S
    (line,) = lines(capsys)
    assert "takes no more values" in line
    assert store.counters().shared_hits > 0


def test_a_cluster_that_is_gone(tmp_path, capsys):
    with start_redis(tmp_path) as server:
        store = reader(server.url.replace("redis:", "redis+cluster:"))  # a single server is no cluster
        assert read(store) < BOUND_S
    assert len(lines(capsys)) == 1
