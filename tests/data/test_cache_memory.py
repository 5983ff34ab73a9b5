"""Which values stay in process memory: bounds hold, values are right, and the policies reach what they promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.data.cache_memory import ServeMemory, TrainMemory


def memories(capacity):
    return TrainMemory(capacity), ServeMemory(capacity, ttl_s=60.0)


def hits(memory, trace):
    found = 0
    for key in trace:
        if memory.get(key) is None:
            memory.put(key, key + 1, 1)
        else:
            assert memory.get(key) == key + 1
            found += 1
    return found


@given(st.integers(0, 40), st.lists(st.tuples(st.integers(0, 12), st.integers(1, 20), st.booleans())))
def test_memory_stays_within_its_bytes_and_gives_what_was_put(capacity, trace):
    for memory in memories(capacity):
        put: dict[int, int] = {}
        for key, size, expected in trace:
            size = put.setdefault(key, size)
            if expected:
                memory.expect(key)
            else:
                memory.fulfil(key)
            assert (memory.peek if expected else memory.get)(key) in (None, key * 100)
            memory.put(key, key * 100, size)
            assert memory.used <= capacity
        assert memory.used == sum(put[key] for key in put if memory.get(key) is not None)


def test_what_is_larger_than_the_memory_pushes_nothing_out():
    for memory in memories(10):
        memory.put("a", 1, 10)
        memory.put("b", 2, 11)
        assert (memory.get("a"), memory.get("b")) == (1, None)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_epochs_in_new_orders_keep_a_hit_for_every_value_that_fits(share):
    rng = np.random.default_rng(0)
    rows, epochs = 2000, 8
    trace = [key for _ in range(epochs) for key in rng.permutation(rows).tolist()]
    most = int(share * rows) * (epochs - 1)  # no cache without foresight has more
    assert hits(TrainMemory(int(share * rows), reused=False), trace) == most
    assert 0.95 * most <= hits(TrainMemory(int(share * rows)), trace) <= most


def test_windows_are_given_the_room_that_they_need_and_no_more():
    rng = np.random.default_rng(0)
    blocks, window, rows, room = 300, 8, 32, 64
    memory, misses = TrainMemory(room), []
    for _ in range(6):
        order, missed = rng.permutation(blocks), 0
        for start in range(0, blocks, window):
            trace = rng.permutation(np.repeat(order[start : start + window], rows)).tolist()
            missed += len(trace) - hits(memory, trace)
        misses.append(missed)
    assert window // 2 <= memory.reserve <= 2 * window
    assert max(misses[1:]) <= blocks + window  # a block is read once an epoch: never twice within a window
    assert max(misses[2:]) <= blocks - (room - 3 * window)  # and what is kept not at all


def test_what_is_expected_stays_until_it_was_asked_for():
    memory = TrainMemory(10)
    for key in range(10):
        memory.put(key, key, 1)
    for key in range(20, 26):
        memory.expect(key)
        memory.put(key, key, 1)
    hits(memory, range(100, 120))
    assert [memory.get(key) for key in range(20, 26)] == [*range(20, 26)]
    for key in range(20, 26):
        memory.fulfil(key)
    hits(memory, range(200, 220))
    assert [memory.get(key) for key in range(20, 26)] == [None] * 6


def test_popular_values_survive_a_scan():
    memory = ServeMemory(100, ttl_s=60.0)
    hits(memory, list(range(50)) * 3)
    hits(memory, range(1000, 2000))
    assert sum(memory.get(key) is not None for key in range(50)) >= 45


def test_a_popularity_law_is_served_better_than_by_least_recent_use():
    rng = np.random.default_rng(0)
    keys, room = 1000, 200
    weights = 1 / np.arange(1, keys + 1) ** 1.0
    trace = rng.choice(keys, 15000, p=weights / weights.sum()).tolist()
    recent: dict[int, None] = {}
    lru = 0
    for key in trace:
        lru += key in recent
        recent.pop(key, None)
        recent[key] = None
        if len(recent) > room:
            del recent[next(iter(recent))]
    assert hits(ServeMemory(room, ttl_s=60.0), trace) > lru


def test_values_expire():
    now = [0.0]
    memory = ServeMemory(10, ttl_s=5.0, clock=lambda: now[0])
    memory.put("a", 1, 4)
    now[0] = 4.9
    assert memory.get("a") == 1
    now[0] = 5.0
    assert memory.get("a") is None
    assert memory.used == 0
    memory.put("a", 2, 4)
    assert memory.get("a") == 2
