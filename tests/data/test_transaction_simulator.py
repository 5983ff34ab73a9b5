"""The generated stream: its scenarios as described, the same for the same seed, and an honest ceiling."""

import numpy as np
import pytest

from r1jax.data.transaction_notes import ALARMING, KINDS, ORDINARY, SILENT, VAGUE, WRITTEN, draw_notes
from r1jax.data.transaction_simulator import (
    CUSTOMER_DAYS,
    LIMIT,
    TERMINAL_DAYS,
    attainable_recall,
    simulate,
)
from r1jax.data.transactions import DAY

DELAY = 7 * DAY


@pytest.fixture(scope="module")
def table():
    return simulate(3, 200, 90)


def test_the_same_seed_gives_the_same_payments(table):
    assert simulate(3, 200, 90).digest() == table.digest() != simulate(4, 200, 90).digest()


def test_scenarios_are_what_they_are_called(table):
    assert np.array_equal(table.fraud == 1, table.scenario > 0)
    assert (table.amount[table.scenario == 1] > LIMIT).all() and (table.amount[table.scenario == 0] <= LIMIT).all()
    assert {1, 2, 3} == set(table.scenario[table.scenario > 0].tolist())
    day, struck = table.seconds // DAY, int(np.flatnonzero(table.scenario == 2)[0])
    week = (table.terminal == table.terminal[struck]) & (day >= day[struck]) & (day < day[struck] + 7)
    assert week.sum() > 3 and (table.fraud[week] == 1).all()  # every payment at a compromised terminal
    mean = np.bincount(table.customer, table.amount) / np.bincount(table.customer)
    ratio = table.amount / mean[table.customer]
    assert ratio[table.scenario == 3].mean() > 3 > 1.5 > ratio[table.scenario == 2].mean()


def test_notes_say_what_they_are_drawn_for():
    fraud = np.arange(40000) % 2 == 0
    text, kind = draw_notes(np.random.default_rng(0), fraud)
    words = np.array(text.to_pylist())
    assert ((words == "") == (kind == SILENT)).all()
    assert not set(words[kind == ALARMING]) & set(words[kind == ORDINARY])
    assert any(word.isascii() for word in words[kind == VAGUE]) and not all(word.isascii() for word in words)
    for guilty in (True, False):
        for which in (ORDINARY, VAGUE, ALARMING):
            share = (kind[fraud == guilty] == which).mean()
            want = WRITTEN[guilty] * KINDS[guilty][which - 1]
            assert abs(share - want) < 4 * np.sqrt(want / 20000)


def test_the_ceiling_counts_what_leaves_a_trace(table):
    rows = np.flatnonzero(table.seconds // DAY - table.seconds[0] // DAY >= 30)
    none = attainable_recall(table, rows, DELAY, 0.0)
    assert 0 < none["text"] < none["transactions"] < none["both"] < 1
    fraud = rows[table.fraud[rows] == 1]
    assert none["text"] == pytest.approx((table.shown[fraud] >= 2).mean())
    seen = 0
    for row in fraud:
        since = table.seconds[row] - table.seconds
        told = (table.fraud == 1) & (since >= DELAY)
        seen += bool(
            table.shown[row] % 2
            or (told & (table.terminal == table.terminal[row]) & (since < TERMINAL_DAYS * DAY)).any()
            or (told & (table.customer == table.customer[row]) & (since < CUSTOMER_DAYS * DAY)).any()
            or (
                (table.shown % 2 == 1)
                & (table.customer == table.customer[row])
                & (since > 0)
                & (since < CUSTOMER_DAYS * DAY)
            ).any()
        )
    assert none["transactions"] == pytest.approx(seen / len(fraud))
    later = attainable_recall(table, rows, 21 * DAY, 0.0)
    assert later["transactions"] < none["transactions"] and later["text"] == none["text"]
    assert attainable_recall(table, rows, DELAY, 1.0) == dict.fromkeys(("both", "transactions", "text"), 1.0)
    assert np.isnan(attainable_recall(table, rows[:0], DELAY, 0.1)["both"])
