"""Counters add up over threads, are stored once each, and print as a table."""

import threading

import pytest

from r1jax.data.cache_counters import STORED, CacheCounters, Tally, line, table, total


def test_threads_lose_no_count():
    tally = Tally()

    def work():
        for _ in range(1000):
            tally.add(rows=2, lookups=1, cold_s=0.5)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counters = tally.read(memory_bytes=7, breaker_open=1)
    assert counters == CacheCounters(rows=16000, lookups=8000, cold_s=4000.0, memory_bytes=7, breaker_open=1)
    assert all(type(value) is (float if name.endswith("_s") else int) for name, value in counters._asdict().items())


def test_what_was_not_stored_is_stored_later():
    tally = Tally()
    tally.add(rows=5, misses=1)
    taken = tally.take_unstored()
    assert taken == {"rows": 5, "misses": 1}
    assert tally.take_unstored() == {}
    tally.give_back(taken)
    tally.add(rows=2)
    assert tally.take_unstored() == {"rows": 7, "misses": 1}


def test_unknown_counters_are_refused():
    with pytest.raises(KeyError):
        Tally().add(hits=1)
    assert set(STORED) <= set(CacheCounters._fields)


def test_the_table_shows_shares():
    text = table(CacheCounters(requests=3, rows=40, lookups=8, memory_hits=4, shared_hits=2, waits=1, misses=1))
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:5]}
    assert rows["memory"][:2] == ["4", "50.00%"]
    assert rows["shared"][:2] == ["2", "25.00%"]
    assert (rows["waited"][1], rows["cold"][1]) == ("12.50%", "12.50%")
    assert "shared tier left alone" not in text
    assert "shared tier left alone" in table(CacheCounters(breaker_open=1))


def test_processes_are_summed_and_told_in_one_line():
    one = CacheCounters(lookups=6, memory_hits=3, shared_hits=1, misses=2, cold_bytes=2**20, cold_s=0.5, breaker_open=1)
    both = total([one._asdict(), one._asdict(), {}, {"reads": 7.0}])
    assert both.lookups == 12 and both.cold_s == 1.0 and both.breaker_open == 2
    assert all(type(value) is (float if name.endswith("_s") else int) for name, value in both._asdict().items())
    said = line(both)
    assert said == (
        "cache: 12 lookups, 50.0% in memory, 16.7% in LMDB or Redis, 0.0% on their way, 33.3% from the cold store, "
        "which read 2.0 MiB"
    )
    named = both.figures("cache.")
    assert named["cache.hit_rate"] == 8 / 12 and named["cache.misses"] == 4 and len(named) == len(both) + 1
    assert total([]).figures("cache.") == {}
