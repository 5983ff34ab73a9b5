"""Counters add up over threads, are stored once each, and print as a table."""

import threading

import pytest

from r1jax.data.cache_counters import STORED, CacheCounters, Tally, table


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
