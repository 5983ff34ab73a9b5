"""Streams and windows: the handbook's definitions, no look into the future, and the live form."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.data.transaction_history import (
    FEATURES,
    FRAUD,
    GENUINE,
    NO_GAP,
    UNKNOWN,
    WINDOWS,
    History,
    window_features,
)
from r1jax.data.transaction_live import LiveHistory, Payment
from r1jax.data.transactions import DAY, HORIZON, check
from r1jax.errors import UserError
from tests.data.streams import draw_table

DELAY, EVENTS = 7 * DAY, 5


def spread(table):
    """The same with amounts of which some are large against what the customer usually pays."""
    return replace(table, amount=np.square(table.amount) / np.float32(100))


def all_of(table, delay=DELAY):
    """Everything that a model is given of any payment."""
    history = History(table, delay, EVENTS)
    return history.features, *history.streams(np.arange(len(table)))


def test_window_features_are_those_of_the_handbook():
    table = draw_table(rows=200, unknown=0.0)
    found = window_features(table, DELAY)
    frame = pd.DataFrame(
        {"c": table.customer, "m": table.terminal, "a": table.amount.astype(float), "f": table.fraud.astype(float)},
        index=pd.to_datetime(table.seconds, unit="s"),
    )
    want = np.zeros_like(found)
    want[:, 0] = table.amount
    want[:, 1] = frame.index.day_of_week >= 5
    want[:, 2] = frame.index.hour <= 6
    for customer in range(3):
        own = frame[frame.c == customer].a
        for i, days in enumerate(WINDOWS):
            rolled = own.rolling(f"{days}D")
            want[frame.c == customer, 3 + 2 * i], want[frame.c == customer, 4 + 2 * i] = rolled.count(), rolled.mean()
    for row in range(len(table)):
        since = table.seconds[row] - DELAY - table.seconds
        for i, days in enumerate(WINDOWS):
            window = (table.terminal == table.terminal[row]) & (since >= 0) & (since < days * DAY)
            want[row, 9 + 2 * i] = window.sum()
            want[row, 10 + 2 * i] = table.fraud[window].mean() if window.any() else 0
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_a_stream_holds_the_last_events_in_order_with_the_payment_itself_last():
    table = draw_table()
    streams = History(table, DELAY, EVENTS).streams(np.arange(len(table)))
    for row in (0, 17, 59):
        for i, entity in enumerate((table.customer, table.terminal)):
            events = np.flatnonzero(entity[: row + 1] == entity[row])
            last = events[-EVENTS:]
            n = len(last)
            np.testing.assert_array_equal(streams.valid[row, i], np.arange(EVENTS) >= EVENTS - n)
            numbers, states = streams.numbers[row, i, EVENTS - n :], streams.states[row, i, EVENTS - n :]
            np.testing.assert_array_equal(numbers[:, 0], table.amount[last])
            np.testing.assert_array_equal(numbers[:, -1], table.seconds[row] - table.seconds[last])
            gaps = np.diff(table.seconds[events], prepend=table.seconds[events[0]] - int(NO_GAP))
            np.testing.assert_array_equal(numbers[:, -2], gaps[-EVENTS:])
            known = (table.seconds[last] + DELAY <= table.seconds[row]) & ~np.isnan(table.fraud[last])
            want = np.where(known, np.where(table.fraud[last] == 1, FRAUD, GENUINE), UNKNOWN)
            np.testing.assert_array_equal(states, want)
            assert not streams.numbers[row, i, : EVENTS - n].any()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), row=st.integers(0, 59), days=st.sampled_from([0.5, 7, 40]))
def test_nothing_depends_on_labels_younger_than_the_delay_or_on_later_payments(seed, row, days):
    delay = int(days * DAY)
    table, rng = spread(draw_table(seed)), np.random.default_rng(seed)
    young = table.seconds + delay > table.seconds[row]
    fraud = np.where(young, rng.choice([0.0, 1.0, np.nan], len(table)), table.fraud).astype(np.float32)
    later = np.arange(len(table)) > row
    shuffled = lambda x: np.where(later, rng.permutation(x), x).astype(x.dtype)  # noqa: E731
    changed = replace(
        table,
        fraud=fraud,
        amount=np.where(later, 999, table.amount).astype(np.float32),
        customer=shuffled(table.customer),
        terminal=shuffled(table.terminal),
    )
    for before, after in zip(all_of(table, delay), all_of(changed, delay), strict=True):
        np.testing.assert_array_equal(before[row], after[row])


def test_a_label_shows_from_the_delay_on():
    """So that the test above cannot pass because labels are never seen."""
    table = draw_table(rows=2, entities=1, unknown=0.0)
    for age, state in ((DELAY - 1, UNKNOWN), (DELAY, FRAUD)):
        seconds = table.seconds[:1] + np.array([0, age])
        seen = replace(table, seconds=seconds, fraud=np.array([1, 0], np.float32))
        features, _, states, _ = all_of(seen)
        assert states[1, 1].tolist() == [0, 0, 0, state, UNKNOWN]
        for name in ("terminal_risk_1d", "terminal_fraud_count"):
            assert features[1, FEATURES.index(name)] == (state == FRAUD)


def lived_through(table, delay=DELAY):
    """The live form of everything, payment by payment; labels come just in time."""
    live, told = LiveHistory(delay, EVENTS), 0
    for row in range(len(table)):
        while told < row and table.seconds[told] + delay <= table.seconds[row]:
            if not np.isnan(table.fraud[told]):
                live.label(f"t{told}", bool(table.fraud[told]))
            told += 1
        own = (str(table.customer[row]), str(table.terminal[row]), float(table.amount[row]))
        features, streams = live.observe(Payment(f"t{row}", int(table.seconds[row]), *own))
        yield live, (features, *streams)


# Over 3,000 days most names are silent for longer than the horizon between some of their payments.
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**16), entities=st.integers(1, 12), days=st.sampled_from([120, 3000]))
def test_the_live_form_equals_the_batch_form_bit_for_bit(seed, entities, days):
    table = spread(draw_table(seed, rows=150, entities=entities, days=days))
    wanted = all_of(table)
    for row, (_, found) in enumerate(lived_through(table)):
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(ours[0], theirs[row])


def test_a_label_that_takes_longer_than_the_horizon_still_counts():
    table, delay = draw_table(rows=150, entities=4, days=1000), HORIZON + 20 * DAY
    wanted = all_of(table, delay)
    assert wanted[0][:, FEATURES.index("terminal_risk_30d")].any()
    for row, (_, found) in enumerate(lived_through(table, delay)):
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(ours[0], theirs[row])


def test_names_that_have_been_silent_for_longer_than_the_horizon_are_forgotten():
    live = LiveHistory(DELAY, EVENTS)
    for day in range(1000):
        live.observe(Payment(str(day), day * DAY, f"c{day}", f"m{day // 2}", 1.0))
    days = HORIZON // DAY + 1
    assert len(live.customers) == days and len(live.terminals) == days // 2 + 1
    assert len(live._places) == days + 1  # the one terminal's first payment is older
    assert live.label("999", True) and not live.label("700", True)


@pytest.mark.parametrize("history", [lambda: all_of(draw_table(), 0), lambda: LiveHistory(0, EVENTS)])
def test_a_payment_never_sees_its_own_label(history):
    with pytest.raises(UserError, match="label delay is 0 seconds"):
        history()


def test_the_live_state_does_not_grow_with_the_stream():
    live = LiveHistory(DELAY, EVENTS)
    for day in range(1000):
        live.observe(Payment(str(day), day * DAY, "c", "m", 1.0))
    assert len(live._places) < 120 and live.customers["c"].count < 120


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seconds": 5}, "the clock goes backwards"),
        ({"customer": " "}, "the customer is empty"),
        ({"id": "a"}, "'a' came before"),
        ({"amount": -1.0}, "the amount is -1.0"),
        ({"amount": float("nan")}, "the amount is nan"),
        ({"amount": 1e300}, "the amount is 1e.300, but it must be a number, not negative, below 2147483648"),
        ({"seconds": 2**63}, "the time is 9223372036854775808: give seconds since 1970"),
        ({"terminal": "\x01"}, "the terminal is empty"),
    ],
)
def test_a_live_payment_that_cannot_be_one_is_refused(change, message):
    live = LiveHistory(DELAY, EVENTS)
    live.observe(Payment("a", 10, "c", "m", 1.0))
    with pytest.raises(UserError, match=message):
        live.observe(Payment("b", 10, "c", "m", 1.0)._replace(**change))
    features, _ = live.observe(Payment("b", 10, "c", "m", 1.0))  # nothing is left of what was refused
    assert features[0, FEATURES.index("customer_count_1d")] == 2


def test_a_table_of_huge_amounts_is_refused():
    table = draw_table()
    with pytest.raises(UserError, match="row 60: TX_AMOUNT is .*, but it must be below 2147483648"):
        check(replace(table, amount=np.append(table.amount[:-1], np.float32(1e12))), "here")
