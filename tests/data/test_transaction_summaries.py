"""Summaries of habits and labels against their definitions, payment by payment."""

from dataclasses import replace

import numpy as np
import pytest

from r1jax.data.transaction_summaries import CUSTOMER, HABIT, LARGE, LOOK, SUMMARIES, TERMINAL, summaries
from r1jax.data.transactions import DAY
from tests.data.streams import draw_table

DELAY = 7 * DAY
NONE = LOOK + DELAY / DAY


@pytest.fixture(scope="module")
def table():
    """A stream with large amounts, long enough for a full habit and for events that lie too far back."""
    drawn = draw_table(rows=400, entities=3, days=150)
    return replace(drawn, amount=np.square(drawn.amount) / np.float32(100))


@pytest.fixture(scope="module")
def told(table):
    found, large = summaries(table, DELAY)
    return dict(zip(SUMMARIES, found.T, strict=True)) | {"large": large}


def days_since(table, row, rows, place, none):
    return (table.seconds[row] - table.seconds[rows[place]]) / DAY if len(rows) else none


def test_what_is_usual_is_the_median_of_the_last_earlier_amounts(table, told):
    for row in range(len(table)):
        earlier = np.flatnonzero(table.customer[:row] == table.customer[row])[-HABIT:]
        amounts = np.sort(table.amount[earlier]) if len(earlier) else table.amount[row : row + 1]
        usual, high = amounts[len(amounts) // 2], amounts[len(amounts) * 9 // 10]
        assert told["customer_usual"][row] == usual
        assert told["customer_ratio"][row] == pytest.approx(table.amount[row] / max(usual, 0.01), rel=1e-6)
        assert told["customer_ratio_high"][row] == pytest.approx(table.amount[row] / max(high, 0.01), rel=1e-6)
    np.testing.assert_array_equal(told["large"], told["customer_ratio"] > LARGE)
    assert 0.05 < told["large"].mean() < 0.5 and np.bincount(table.customer).min() > HABIT


def test_a_customer_is_summed_up_by_earlier_large_payments(table, told):
    for row in range(len(table)):
        large = np.flatnonzero(told["large"][:row] & (table.customer[:row] == table.customer[row]))
        age = table.seconds[row] - table.seconds[large]
        within = lambda days, age=age, large=large: large[age < days * DAY]  # noqa: E731
        known = large[(age >= DELAY) & (age < DELAY + LOOK * DAY)]
        frauds = known[table.fraud[known] == 1]
        want = [len(within(days)) for days in (3, 7, 14)]
        want += [days_since(table, row, within(LOOK), -1, LOOK), days_since(table, row, within(14), 0, 14)]
        want += [(table.fraud[known] == 0).sum(), len(frauds)]
        want += [days_since(table, row, frauds, place, NONE) for place in (-1, 0)]
        np.testing.assert_allclose([told[name][row] for name in CUSTOMER[3:]], want, rtol=1e-6)
    assert all(len(np.unique(told[name])) > 3 for name in CUSTOMER)


def test_a_terminal_is_summed_up_by_the_labels_that_are_known(table, told):
    for row in range(len(table)):
        earlier = np.flatnonzero(table.terminal[:row] == table.terminal[row])
        age = table.seconds[row] - table.seconds[earlier]
        known = earlier[(age >= DELAY) & (age < DELAY + LOOK * DAY)]
        frauds = known[(table.fraud[known] == 1) & ~told["large"][known]]
        genuine = known[table.fraud[known] == 0]
        want = [len(frauds), *(days_since(table, row, frauds, place, NONE) for place in (-1, 0))]
        want += [days_since(table, row, genuine, -1, NONE)]
        want += [(genuine > frauds[-1]).sum() if len(frauds) else len(genuine)]
        want += [days_since(table, row, genuine[genuine < frauds[0]] if len(frauds) else genuine[:0], -1, NONE)]
        want += [(age < DELAY).sum()]
        np.testing.assert_allclose([told[name][row] for name in TERMINAL], want, rtol=1e-6)
    assert all(len(np.unique(told[name])) > 3 for name in TERMINAL)


def test_amounts_of_nothing_give_finite_ratios():
    drawn = draw_table(rows=20, entities=1)
    amount = np.where(np.arange(20) < 10, 0, 5).astype(np.float32)
    found, _ = summaries(replace(drawn, amount=amount), DELAY)
    assert np.isfinite(found).all() and found[9, CUSTOMER.index("customer_ratio")] == 0
    assert found[10, CUSTOMER.index("customer_ratio")] == pytest.approx(500)
