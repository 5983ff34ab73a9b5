"""`r1jax data stats` counts what lies in Redis and LMDB, data set by data set, and what readers made of it."""

import gc

import numpy as np
import pytest

from r1jax.config import CacheConfig
from r1jax.data.cache_redis import RedisTier
from r1jax.data.cache_values import dataset_name
from r1jax.data.tiered import TieredStore
from r1jax.errors import UserError
from r1jax.serve.cache_stats import Holding, report, stats_command
from tests.data.services import free_port
from tests.data.stores import MemoryStore


def fill(url):
    """Two data sets, the first read twice; gives their names."""
    names = []
    for fingerprint, unit, reads in (("aaaa", "group", 2), ("bbbb", "row", 1)):
        cold = MemoryStore([4] * 6, fingerprint)
        names.append(dataset_name(cold))
        for _ in range(reads):
            store = TieredStore(cold, CacheConfig(url=url, unit=unit))
            store.read_rows(np.arange(20))
            store.store_counters()
    return names


def table_of(text):
    return {line.split()[0]: line.split()[1:] for line in text.splitlines()[2:]}


@pytest.mark.parametrize("kind", ["redis", "lmdb"])
def test_two_data_sets(kind, tmp_path, request, capsys):
    if kind == "redis":
        url = request.getfixturevalue("redis_server").url
        client = RedisTier(url, 1.0).client()
        client.flushall()
        client.set("somebody else's", "1")
        client.lpush("r1jax:strange:group:0", "1")
        client.close()
    else:
        url = f"lmdb:{tmp_path}"
    first, second = fill(url)
    gc.collect()  # LMDB opens a file once in a process
    assert stats_command(["--cache", url]) == 0
    text = capsys.readouterr().out
    table = table_of(text)
    assert table.keys() == {first, second}
    groups, rows, _, lookups, memory, shared, _, cold, rejected, _ = table[first]
    assert (groups, rows, lookups, memory, shared, cold, rejected) == ("5", "0", "10", "0.0%", "50.0%", "50.0%", "0")
    groups, rows, _, lookups, memory, shared, _, cold, rejected, _ = table[second]
    assert (groups, rows, lookups, shared, cold) == ("0", "20", "20", "0.0%", "100.0%")
    assert text.startswith(f"{url}: ") and "MiB" in text.splitlines()[0]


def test_an_empty_cache_and_one_without_counters():
    assert report("x", {}, "fine").splitlines() == ["x: fine", "no data set is in it"]
    assert table_of(report("x", {"d": Holding(groups=2, size=2**20)}, "fine"))["d"][:4] == ["2", "0", "1.0", "0"]


def test_what_cannot_be_read_is_said(tmp_path, monkeypatch):
    for words, told in (
        (["--cache", "memory"], "ends with the process"),
        (["--cache", "reddis://h"], "did you mean 'redis'"),
        (["--cache", f"lmdb:{tmp_path}"], "no LMDB file"),
        (["--cache", f"redis://:secret@127.0.0.1:{free_port()}"], "cannot be read .ConnectionError"),
        ([], "no cache was named"),
    ):
        with pytest.raises(UserError, match=told) as error:
            stats_command(words)
        assert "secret" not in str(error.value)
