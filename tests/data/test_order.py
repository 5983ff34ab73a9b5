"""Permutations: each row once an epoch, uniform, the same for every batch size, and at once at any batch."""

import math
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.config import DataConfig
from r1jax.data.order import SORTED, GlobalOrder, WindowOrder, feistel, open_order
from r1jax.data.schema import Schema
from r1jax.data.source import Source
from r1jax.errors import UserError


def stream(order, batches):
    return np.concatenate([order.batch(k) for k in range(batches)])


def starts_of(sizes):
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


@st.composite
def orders(draw):
    """A way to make an order of any batch size, and its number of rows."""
    seed = draw(st.integers(0, 2**32 - 1))
    if draw(st.booleans()):
        rows = draw(st.integers(1, 200))
        return rows, lambda size: GlobalOrder(rows, size, seed)
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(any))
    window = draw(st.integers(1, 25))
    return sum(sizes), lambda size: WindowOrder(starts_of(sizes), size, seed, window)


@settings(max_examples=200)
@given(orders(), st.integers(1, 60), st.integers(1, 60))
def test_epochs_are_permutations_whatever_the_batch_size(made, one, other):
    rows, make = made
    flat = stream(make(one), -(-3 * rows // one))[: 3 * rows]
    for epoch in flat.reshape(3, rows):
        assert sorted(epoch.tolist()) == list(range(rows))
    assert flat.tolist() == stream(make(other), -(-3 * rows // other))[: 3 * rows].tolist()


@settings(max_examples=100)
@given(orders(), st.integers(1, 30), st.integers(0, 10**6))
def test_a_batch_does_not_depend_on_what_was_read_before(made, size, k):
    order, fresh = made[1](size), made[1](size)
    for earlier in (0, k // 2, k + 1):
        order.batch(earlier)
    assert order.batch(k).tolist() == fresh.batch(k).tolist() == pickle.loads(pickle.dumps(order)).batch(k).tolist()


@pytest.mark.parametrize("rows", [2, 3, 64, 65, 1000, 65537, 100_000])
def test_feistel_network_is_a_permutation(rows):
    keys = np.random.Philox(key=7).random_raw(8)
    assert np.array_equal(np.sort(feistel(np.arange(rows), rows, keys)), np.arange(rows))


def test_large_sources_need_no_list_of_their_rows():
    rows = 10**12
    order = GlobalOrder(rows, 4096, 3)
    first, late = order.batch(0), order.batch(rows // 4096 - 1)
    assert len(set(first) | set(late)) == 8192 and first.min() >= 0 and first.max() < rows
    assert abs(np.concatenate([first, late]).mean() / rows - 0.5) < 4 / math.sqrt(12 * 8192)


def chi_square(counts, expected):
    """Standard normal deviate of Pearson's statistic (Wilson and Hilferty), for any number of cells."""
    counts = np.asarray(counts, float)
    degrees = counts.size - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))


def test_all_permutations_of_few_rows_are_as_frequent():
    order, epochs = GlobalOrder(4, 4, 11), 4800
    seen = Counter(tuple(order.batch(k).tolist()) for k in range(epochs))
    assert len(seen) == 24 and abs(chi_square(list(seen.values()), epochs / 24)) < 4


@pytest.mark.parametrize("rows", [5000, SORTED + 1, 300_000])
def test_rows_are_as_likely_at_every_place_and_neighbours_part(rows):
    order = GlobalOrder(rows, 32, 5)
    per_epoch = rows // 32
    batches = [order.batch(epoch * per_epoch + epoch + 1 + j) for epoch in range(40) for j in (0, 1, 60)]
    read = np.concatenate(batches)
    assert abs(chi_square(np.bincount(read * 64 // rows, minlength=64), len(read) / 64)) < 4
    gaps = np.diff(np.stack(batches), axis=1)
    assert np.mean(np.abs(gaps) < rows / 100) < 0.05  # 2 % by chance
    pairs = np.stack(batches)[:, :-1] * 8 // rows * 8 + np.stack(batches)[:, 1:] * 8 // rows
    assert abs(chi_square(np.bincount(pairs.ravel(), minlength=64), pairs.size / 64)) < 4


def test_network_and_sorting_are_uniform_over_epochs_at_one_place():
    rows, epochs = SORTED + 100, 6400
    order = GlobalOrder(rows, rows, 1)
    first = [int(order._at(epoch, np.array([17]))[0]) for epoch in range(epochs)]
    assert abs(chi_square(np.bincount(np.array(first) * 32 // rows, minlength=32), epochs / 32)) < 4


def test_a_window_reads_few_row_groups():
    sizes = [64] * 100
    order = WindowOrder(starts_of(sizes), 64, 0, 4)
    epochs = [stream(order, 200)[i * 6400 : (i + 1) * 6400] for i in range(2)]
    for epoch in epochs:
        for window in epoch.reshape(-1, 4 * 64):
            assert len(set(window // 64)) == 4
            assert len(set((window // 64)[:64])) == 4  # mixed within, not one group after the other
    assert epochs[0].tolist() != epochs[1].tolist()
    assert set(epochs[0][:256] // 64) != set(epochs[1][:256] // 64)


def test_windows_shuffle_uniformly():
    order = WindowOrder(starts_of([2, 1, 1]), 4, 9, 3)
    seen = Counter(tuple(order.batch(k).tolist()) for k in range(4800))
    assert len(seen) == 24 and abs(chi_square(list(seen.values()), 200)) < 4


def test_seeds_and_windows_give_other_orders():
    starts = starts_of([8] * 30)
    firsts = [GlobalOrder(240, 16, 0), GlobalOrder(240, 16, 1), WindowOrder(starts, 16, 0, 4)]
    firsts += [WindowOrder(starts, 16, 1, 4), WindowOrder(starts, 16, 0, 5)]
    assert len({tuple(order.batch(0).tolist()) for order in firsts}) == 5


def test_an_order_never_changes():
    """Runs go on from checkpoints of earlier versions: whoever changes these numbers raises `VERSION`."""
    assert GlobalOrder(10, 5, 42).batch(3).tolist() == [2, 7, 1, 6, 8]
    assert GlobalOrder(100_000, 5, 42).batch(3).tolist() == [82578, 38233, 46303, 61450, 62905]
    assert WindowOrder(starts_of([3, 4, 3]), 5, 42, 2).batch(3).tolist() == [0, 5, 4, 3, 6]


@pytest.mark.parametrize("starts", [[0], [0, 0], [1, 3], [0, 5, 3]])
def test_row_groups_must_rise(starts):
    with pytest.raises(UserError, match="row groups must start at 0"):
        WindowOrder(np.array(starts, np.int64), 4, 0, 2)


class Plain(Source):
    name, fingerprint, schema = "plain cases", "0", Schema(())

    def __len__(self):
        return 8


def test_a_window_needs_row_groups():
    source = Plain()
    assert isinstance(open_order(source, 4, DataConfig()), GlobalOrder)
    with pytest.raises(UserError, match="'plain cases' has no row groups"):
        open_order(source, 4, DataConfig(order="window"))
    source.starts = np.array([0, 4, 8])
    assert isinstance(open_order(source, 4, DataConfig(order="window")), WindowOrder)
