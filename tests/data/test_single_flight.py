"""Several threads that want the same load it once; errors reach everybody who waited."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from r1jax.data.single_flight import SingleFlight


def nothing(number):
    """Finds nothing."""


def test_each_value_is_loaded_once_at_a_time():
    kept: dict[int, int] = {}
    loaded = []
    gate = threading.Barrier(8)

    def load(numbers):
        loaded.extend(numbers)
        return {number: number * 10 for number in numbers}

    flight = SingleFlight(kept.__setitem__)

    def work(thread):
        gate.wait()
        wanted = [(thread + shift) % 20 + 1 for shift in range(12)]
        landed = flight.fetch(wanted, kept.get, load)
        assert landed.values == {number: number * 10 for number in wanted}
        return landed

    with ThreadPoolExecutor(8) as pool:
        landed = list(pool.map(work, range(8)))
    assert sorted(loaded) == sorted(set(loaded)) == list(range(1, 20))
    assert sum(one.ready + one.waited for one in landed) + len(loaded) == 8 * 12


def test_waiting_is_counted_and_a_failure_reaches_all_and_is_not_kept():
    flight = SingleFlight(lambda number, value: None)
    started, go = threading.Event(), threading.Event()

    def fail(numbers):
        started.set()
        assert go.wait(200)
        raise ValueError("cold")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(flight.fetch, [1], nothing, fail)
        assert started.wait(200)
        second = pool.submit(flight.fetch, [1, 2], nothing, lambda numbers: {number: number for number in numbers})
        go.set()
        for one in (first, second):
            with pytest.raises(ValueError, match="cold"):
                one.result(200)
    assert flight.fetch([1], nothing, lambda numbers: {1: 5}).values == {1: 5}
