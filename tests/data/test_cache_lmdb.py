"""LMDB as a tier: values, expiry, bounds, writers that were stopped or killed, one file for many openers."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1jax.data import cache_lmdb
from r1jax.data.cache_lmdb import LmdbTier
from r1jax.data.cache_redis import counters_key
from r1jax.data.cache_values import NotStored

VALUES = {f"key {i}".encode(): bytes([i]) * i * 100 for i in range(1, 60)}
ROOT = Path(__file__).resolve().parents[2]


def test_values_come_back_also_to_another_opener_and_after_a_restart(tmp_path):
    tier = LmdbTier(str(tmp_path / "new" / "folder"), 2**24, ttl_s=60.0)
    tier.put_many(VALUES)
    keys = [*reversed(VALUES), b"unknown"]
    wanted = [VALUES.get(key) for key in keys]
    second = pickle.loads(pickle.dumps(tier))
    assert tier.get_many(keys) == second.get_many(keys) == wanted
    assert tier.environment() is second.environment()
    del tier, second
    assert LmdbTier(str(tmp_path / "new" / "folder"), 2**24, ttl_s=60.0).get_many(keys) == wanted


def test_values_expire_and_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_lmdb, "PURGE_S", 0.0)
    now = [1000.0]
    monkeypatch.setattr(cache_lmdb.time, "time", lambda: now[0])
    tier = LmdbTier(str(tmp_path), 2**20, ttl_s=60.0)
    stored = []
    with pytest.raises(NotStored, match="1048576 bytes are full"):
        for number in range(100):
            tier.put_many({b"old %d" % number: bytes(30_000)})
            stored.append(b"old %d" % number)
    assert 20 < len(stored) < 36
    assert tier.get_many(stored) == [bytes(30_000)] * len(stored)  # nothing that lives was pushed out
    now[0] += 61.0
    assert tier.get_many(stored) == [None] * len(stored)
    for number in range(15):
        tier.put_many({b"new %d" % number: bytes(30_000)})
    assert tier.get_many([b"new 0", b"new 14"]) == [bytes(30_000)] * 2
    assert (tmp_path / "data.mdb").stat().st_size <= 2**20


def test_counters_add_up_and_are_no_values(tmp_path):
    tier = LmdbTier(str(tmp_path), 2**20, ttl_s=60.0)
    tier.add_counts("set", {"rows": 3.0, "misses": 1.0})
    tier.add_counts("set", {"rows": 4.0})
    with tier.environment().begin() as reader:
        assert json.loads(reader.get(counters_key("set"))) == {"rows": 7.0, "misses": 1.0}
    assert not cache_lmdb._expired(counters_key("set"), b"{}", time.time())


WRITER = """
import sys, time
from r1jax.data.cache_lmdb import LmdbTier
tier = LmdbTier(sys.argv[1], 2**22, 60.0)
with tier._writing() as environment, environment.begin(write=True) as writer:
    writer.put(b"half", b"written")
    print("holding", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("end", [signal.SIGSTOP, signal.SIGKILL])
def test_a_writer_that_was_stopped_or_killed_holds_nobody_up(tmp_path, end):
    tier = LmdbTier(str(tmp_path), 2**22, ttl_s=60.0)
    tier.put_many({b"a": b"1"})
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT, text=True
    ) as writer:
        try:
            assert writer.stdout.readline() == "holding\n"
            os.kill(writer.pid, end)
            start = time.monotonic()
            if end == signal.SIGSTOP:
                with pytest.raises(NotStored, match="another process"):
                    tier.put_many({b"b": b"2"})
            else:
                writer.wait()
                tier.put_many({b"b": b"2"})
            assert time.monotonic() - start < 120  # it would hold it for ten minutes
            assert tier.get_many([b"a", b"half"]) == [b"1", None]
        finally:
            writer.kill()


FORKER = """
import os, sys
from r1jax.data.cache_lmdb import LmdbTier
from r1jax.config import CacheConfig
from r1jax.data.tiered import TieredStore
from tests.data.stores import MemoryStore, same
store = TieredStore(MemoryStore([4] * 8), CacheConfig(url=sys.argv[1], capacity=1))
import numpy as np
same(store.read_rows(np.arange(16)), store.cold, range(16))
children = []
for child in range(3):
    pid = os.fork()
    if not pid:
        same(store.read_rows(np.arange(32)), store.cold, range(32))
        counted = store.counters()
        os._exit(0 if counted.requests == 1 and counted.shared_hits >= 4 else 1)
    children.append(pid)
codes = [os.waitpid(pid, 0)[1] for pid in children]
same(store.read_rows(np.arange(32)), store.cold, range(32))
assert store.counters().shared_hits == 8, store.counters()
sys.exit(max(codes) != 0)
"""


@pytest.mark.parametrize("kind", ["lmdb", "redis"])
def test_forked_readers_open_their_own(tmp_path, kind, request):
    url = f"lmdb:{tmp_path}" if kind == "lmdb" else request.getfixturevalue("redis_server").url
    subprocess.run([sys.executable, "-c", FORKER, url], check=True, cwd=ROOT, timeout=240)
