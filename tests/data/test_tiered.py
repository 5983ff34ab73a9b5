"""Rows through the tiers are the rows of the cold store, whatever is kept, evicted, prefetched or shared."""

import gc
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.config import CacheConfig
from r1jax.data import tiered
from r1jax.data.blocks import BlockStore
from r1jax.data.cache_redis import RedisTier, counters_key
from r1jax.data.cache_values import dataset_name, key_of
from r1jax.data.prefetch import WAITING
from r1jax.data.tiered import TieredStore
from r1jax.errors import UserError
from tests.data.stores import MemoryStore, SlowStore, same

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def redis_url(patient, redis_server):
    """An empty server."""
    with RedisTier(redis_server.url, 1.0).client() as client:
        client.flushall()
    return redis_server.url


def all_told(counters):
    return counters.memory_hits + counters.shared_hits + counters.waits + counters.misses


@settings(max_examples=60)
@given(st.data())
def test_random_reads_and_prefetches_give_the_truth(tmp_path_factory, data):
    sizes = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(sum))
    cache = CacheConfig(
        url=data.draw(st.sampled_from([None, "memory", "lmdb"])),
        capacity=data.draw(st.sampled_from([1, 400, 900, 2000, 10**6])),
        disk_capacity=2**20,
        policy=data.draw(st.sampled_from(["train", "serve"])),
        unit=data.draw(st.sampled_from(["group", "row"])),
    )
    if cache.url == "lmdb":
        cache = CacheConfig(**(vars(cache) | {"url": f"lmdb:{tmp_path_factory.mktemp('lmdb')}"}))
    cold = MemoryStore(sizes)
    store = TieredStore(cold, cache)
    index = st.integers(0, len(cold) - 1)
    asked = 0
    for ahead, wanted in data.draw(st.lists(st.tuples(st.lists(index), st.lists(index, max_size=12)), max_size=12)):
        store.prefetch(np.array(ahead, np.int64))
        same(store.read_rows(np.array(wanted, np.int64)), cold, wanted)
        asked += len(wanted)
    store.drain()
    counters = store.counters()
    assert counters.rows == asked
    assert counters.lookups == all_told(counters)
    assert counters.memory_bytes <= cache.capacity
    assert counters.rejected == 0
    assert counters.cold_blocks == len(cold.read)


def test_a_block_is_read_once_and_a_known_row_not_at_all():
    for unit in ("group", "row"):
        cold = MemoryStore([4, 4, 4])
        store = TieredStore(cold, CacheConfig(unit=unit))
        for wanted in ([0, 1, 5], [5, 0, 0], [1]):
            same(store.read_rows(np.array(wanted)), cold, wanted)
        assert cold.read == [0, 1]
        counters = store.counters()
        assert counters.misses == (2 if unit == "group" else 3)
        assert counters.memory_hits == 3
        assert counters.hit_rate == 3 / (5 if unit == "group" else 6)


def test_rows_of_a_block_that_is_not_kept_do_not_hold_its_memory():
    cold = MemoryStore([1000])
    store = TieredStore(cold, CacheConfig(unit="row"))
    store.read_rows(np.arange(0, 1000, 100))
    assert store.counters().memory_bytes < 0.1 * cold.batch.nbytes


def test_threads_that_want_one_block_read_it_once():
    for unit in ("group", "row"):
        cold = SlowStore([4, 4])
        store = TieredStore(cold, CacheConfig(unit=unit))
        with ThreadPoolExecutor(4) as pool:
            reads = [pool.submit(store.read_rows, np.array([row, 4 + row])) for row in range(4)]
            assert cold.asked.acquire(timeout=200)
            time.sleep(0.05)
            cold.go.set()
            for row, read in enumerate(reads):
                same(read.result(200), cold, [row, 4 + row])
        assert cold.read == [0, 1]


class FailingStore(MemoryStore):
    """Fails until it is mended."""

    def __init__(self, sizes):
        super().__init__(sizes)
        self.error: Exception | None = UserError("the file is gone")

    def read_blocks(self, blocks):
        if self.error is not None:
            raise self.error
        return super().read_blocks(blocks)


@pytest.mark.parametrize("error", [UserError("the file is gone"), OSError("disk"), KeyError("x")])
def test_what_the_cold_store_raises_reaches_the_reader_also_after_a_prefetch(error):
    cold = FailingStore([4, 4])
    cold.error = error
    store = TieredStore(cold, CacheConfig())
    for _ in range(2):
        store.prefetch(np.arange(8))
        store.drain()
        with pytest.raises(type(error)):
            store.read_rows(np.arange(3))
    cold.error = None
    same(store.read_rows(np.arange(3)), cold, range(3))
    store.prefetch(np.arange(8))
    store.drain()
    assert store.counters().prefetched == 1


def test_a_store_that_has_changed_and_rows_that_are_not_there_are_refused():
    cold = MemoryStore([4, 4])
    store = TieredStore(cold, CacheConfig())
    cold.batch = cold.batch.slice(0, 6)
    with pytest.raises(UserError, match="block 1 has 2 rows where 4 were counted"):
        store.read_rows(np.array([7]))
    for wanted in ([8], [-1], [0, 8]):
        with pytest.raises(IndexError, match="of a store of 8"):
            store.read_rows(np.array(wanted))


def test_what_is_prefetched_is_a_hit():
    cold = MemoryStore([4] * 10)
    store = TieredStore(cold, CacheConfig())
    store.prefetch(np.array([1, 2, 39, 77, -3]))
    store.drain()
    assert (store.counters().prefetched, sorted(cold.read)) == (2, [0, 9])
    same(store.read_rows(np.array([38, 0])), cold, [38, 0])
    assert store.counters().hit_rate == 1.0


def test_windows_read_ahead_are_hits_with_room_for_two_windows():
    rng = np.random.default_rng(0)
    cold = MemoryStore([16] * 60)
    size = TieredStore(cold, CacheConfig())
    size.read_rows(np.arange(16))
    store = TieredStore(cold, CacheConfig(capacity=10 * size.counters().memory_bytes))
    batches = []
    for _ in range(3):
        order = rng.permutation(60)
        for start in range(0, 60, 4):
            rows = (order[start : start + 4, None] * 16 + np.arange(16)).ravel()
            batches += np.split(rng.permutation(rows), 8)
    for k, batch in enumerate(batches):
        for ahead in batches[k : k + 4]:
            store.prefetch(ahead)
        store.drain()
        same(store.read_rows(batch), cold, batch)
    assert store.counters().hit_rate >= 0.99
    assert len(cold.read) <= 3 * 60 * 1.15


def test_too_many_prefetches_are_dropped_and_counted():
    cold = SlowStore([4] * 10)
    store = TieredStore(cold, CacheConfig())
    for _ in range(WAITING + 7):
        store.prefetch(np.array([0]))
    assert store.counters().dropped == 7
    cold.go.set()
    store.drain()


def test_what_was_read_meanwhile_is_not_brought():
    cold = SlowStore([4] * 10, slow=[0])
    store = TieredStore(cold, CacheConfig(capacity=1))  # keeps nothing: bringing block 9 would read it again
    store.prefetch(np.array([0]))
    assert cold.asked.acquire(timeout=200)
    store.prefetch(np.array([39]))
    same(store.read_rows(np.array([39], np.int32)), cold, [39])
    cold.go.set()
    store.drain()
    assert cold.read == [9, 0]


def test_the_thread_ends_with_the_store():
    def threads():
        return [thread for thread in threading.enumerate() if thread.name == "r1jax-prefetch"]

    gc.collect()
    before = len(threads())
    store = TieredStore(MemoryStore([4]), CacheConfig())
    store.prefetch(np.array([0]))
    store.drain()
    assert len(threads()) == before + 1
    del store
    gc.collect()
    assert len(threads()) == before


def test_a_program_ends_while_it_prefetches():
    code = (
        "import numpy as np\nfrom r1jax.config import CacheConfig\nfrom r1jax.data.tiered import TieredStore\n"
        "from tests.data.stores import MemoryStore\nstore = TieredStore(MemoryStore([4] * 2000), CacheConfig())\n"
        "for start in range(0, 8000, 200):\n    store.prefetch(np.arange(start, start + 200))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, b"")


def test_it_travels_to_another_process_while_in_use(redis_url):
    cold = MemoryStore([4] * 4)
    store = TieredStore(cold, CacheConfig(url=redis_url))
    store.prefetch(np.arange(16))
    same(store.read_rows(np.arange(16)), cold, range(16))
    code = (
        "import pickle, sys\nimport numpy as np\nfrom tests.data.stores import same\n"
        "store = pickle.load(sys.stdin.buffer)\nsame(store.read_rows(np.arange(16)), store.cold, range(16))\n"
        "assert store.counters().shared_hits == 4\n"
    )
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(store), cwd=ROOT, check=True, timeout=240)


@pytest.mark.parametrize("unit", ["group", "row"])
def test_readers_of_one_cache_share_what_they_read_and_their_counters(redis_url, unit):
    cold = [MemoryStore([4] * 4) for _ in range(3)]
    stores = [TieredStore(one, CacheConfig(url=redis_url, unit=unit)) for one in cold]
    for store, one in zip(stores, cold, strict=True):
        same(store.read_rows(np.arange(16)), one, range(16))
        store.store_counters()
        store.store_counters()  # adds nothing twice
    assert [len(one.read) for one in cold] == [4, 0, 0]
    assert stores[1].counters().shared_hits == (4 if unit == "group" else 16)
    with RedisTier(redis_url, 1.0).client() as client:
        stored = client.hgetall(counters_key(dataset_name(cold[0])))
    assert stored[b"rows"] == b"48"
    assert stored[b"cold_blocks"] == b"4"


def test_a_file_that_was_written_again_is_never_served_from_before(redis_url):
    for seed in (1, 2):
        cold = MemoryStore([4] * 4, fingerprint=f"{seed}", seed=seed)
        store = TieredStore(cold, CacheConfig(url=redis_url))
        same(store.read_rows(np.arange(16)), cold, range(16))
        assert store.counters().shared_hits == 0


def test_a_process_waits_for_another_that_reads_the_same_block(redis_url):
    first, second = SlowStore([4, 4]), MemoryStore([4, 4])
    with ThreadPoolExecutor(2) as pool:
        early = pool.submit(TieredStore(first, CacheConfig(url=redis_url)).read_rows, np.arange(8))
        assert first.asked.acquire(timeout=200)
        late = pool.submit(TieredStore(second, CacheConfig(url=redis_url)).read_rows, np.arange(8))
        time.sleep(0.1)
        first.go.set()
        for read in (early, late):
            same(read.result(200), second, range(8))
    assert second.read == []


def test_nobody_waits_long_for_a_reader_that_is_gone(redis_url, monkeypatch):
    monkeypatch.setattr(tiered, "LEASE_WAIT_S", 0.2)
    cold = MemoryStore([4, 4])
    RedisTier(redis_url, 1.0).lease([key_of(dataset_name(cold), "group", 1)])
    store = TieredStore(cold, CacheConfig(url=redis_url))
    same(store.read_rows(np.arange(8)), cold, range(8))
    assert sorted(cold.read) == [0, 1]


def test_counters_are_stored_while_reading(redis_url, monkeypatch):
    monkeypatch.setattr(tiered, "STORE_EVERY_S", 0.0)
    cold = MemoryStore([4, 4])
    store = TieredStore(cold, CacheConfig(url=redis_url))
    for _ in range(3):
        store.read_rows(np.arange(8))
        time.sleep(0.001)
    with RedisTier(redis_url, 1.0).client() as client:
        assert client.hget(counters_key(dataset_name(cold)), "requests") == b"3"


def test_the_stores_here_keep_the_protocol():
    assert isinstance(MemoryStore([1]), BlockStore)
