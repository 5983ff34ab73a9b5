"""The embedded default data of the finance task: a generated stream of card payments (no person, no bank).

Customers, terminals and the three kinds of fraud follow the description of the Fraud Detection Handbook (chapter 3,
transaction data simulator): amounts that are too large, terminals that were tampered with for four weeks, customers
whose card leaked for two. Two things are added: notes, which carry a part of the signal that no number has, and what
of each fraud can be seen at all, from which the best attainable recall follows.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float64, Int64

from r1jax.data.transaction_index import index_by, last_rows
from r1jax.data.transaction_notes import ALARMING, draw_notes, vague_odds
from r1jax.data.transactions import DAY, Transactions, check

VERSION = 1
"""Raised whenever the same seed gives other payments."""
START = 1735689600
"""2025-01-01, a Wednesday, in seconds since the epoch."""
EDGE, RADIUS = 100.0, 5.0
"""Side of the square that everyone lives in, and how far customers go."""
LIMIT = 220.0
"""Every larger amount is fraud (scenario 1)."""
TERMINAL_DAYS, CUSTOMER_DAYS = 28, 14
"""How long a terminal or a card stays compromised."""
TERMINAL_SHARE, CUSTOMER_SHARE = 0.012, 0.02
"""Share of the terminals and of the cards that is compromised at a time."""
FACTOR, STRUCK = 5.0, 1 / 3
"""What a thief multiplies amounts by, and the share of a leaked card's payments that are the thief's."""


class _Payments(NamedTuple):
    """Before any fraud, in the order of time."""

    seconds: Int64[np.ndarray, " N"]
    customer: Int64[np.ndarray, " N"]
    terminal: Int64[np.ndarray, " N"]
    amount: Float64[np.ndarray, " N"]
    mean: Float64[np.ndarray, " customers"]


def simulate(seed: int, customers: int, days: int) -> Transactions:
    """Draws a stream; there are as many terminals as customers.

    Args:
      seed: Other seeds give other streams.
      customers: Number of cards, each with up to four payments a day.
      days: Length of the stream.

    Returns:
      The payments, with scenarios, notes and `shown`.
    """
    rng = np.random.default_rng((seed, VERSION, customers, days))
    drawn = _genuine(rng, customers, days)
    amount, scenario = drawn.amount.copy(), np.where(drawn.amount > LIMIT, 1, 0)
    terminal = _compromised(rng, drawn.terminal, drawn.seconds, customers, days, TERMINAL_SHARE, TERMINAL_DAYS)
    scenario[terminal] = 2
    leaked = _compromised(rng, drawn.customer, drawn.seconds, customers, days, CUSTOMER_SHARE, CUSTOMER_DAYS)
    struck = leaked & (rng.random(len(amount)) < STRUCK)
    amount[struck] *= FACTOR
    scenario[struck] = 3
    amount = np.round(amount, 2)
    text, kind = draw_notes(rng, scenario > 0)
    # Two standard deviations above what the customer spends, where the deviation is half the mean.
    tells = (scenario == 1) | ((scenario == 3) & (amount > 2 * drawn.mean[drawn.customer]))
    shown = np.where(scenario > 0, tells + 2 * (kind == ALARMING), 0)
    table = Transactions(
        ids=pa.array([f"T{i:07d}" for i in range(len(amount))]),
        seconds=drawn.seconds,
        customer=drawn.customer.astype(np.int32),
        terminal=drawn.terminal.astype(np.int32),
        amount=amount.astype(np.float32),
        fraud=(scenario > 0).astype(np.float32),
        scenario=scenario.astype(np.int8),
        text=text,
        customers=pa.array([f"C{i:05d}" for i in range(customers)]),
        terminals=pa.array([f"M{i:05d}" for i in range(customers)]),
        shown=shown.astype(np.int8),
    )
    return check(table, "the simulator")


def _genuine(rng: np.random.Generator, customers: int, days: int) -> _Payments:
    """Everyone pays at the terminals nearby, mostly about noon, amounts about an own mean."""
    home, place = rng.uniform(0, EDGE, (customers, 2)), rng.uniform(0, EDGE, (customers, 2))
    mean, rate = rng.uniform(5, 100, customers), rng.uniform(0, 4, customers)
    distance = np.linalg.norm(home[:, None] - place[None], axis=-1)
    nearest = np.argsort(distance, axis=1)
    around = np.maximum((distance < RADIUS).sum(axis=1), 1)
    count = rng.poisson(np.broadcast_to(rate[:, None], (customers, days)))
    customer, day = (np.repeat(x.ravel(), count.ravel()) for x in np.indices(count.shape))
    second = rng.normal(DAY / 2, 20000, len(customer))
    awake = (second > 0) & (second < DAY)
    customer, seconds = customer[awake], START + DAY * day[awake] + second[awake].astype(np.int64)
    order = np.argsort(seconds, kind="stable")
    customer, seconds = customer[order], seconds[order]
    amount = rng.normal(mean[customer], mean[customer] / 2)
    amount = np.where(amount < 0, rng.uniform(0, 2 * mean[customer]), amount)
    terminal = nearest[customer, (rng.random(len(customer)) * around[customer]).astype(int)]
    return _Payments(seconds, customer, terminal, amount, mean)


def _compromised(
    rng: np.random.Generator,
    entity: Int64[np.ndarray, " N"],
    seconds: Int64[np.ndarray, " N"],
    count: int,
    days: int,
    share: float,
    lasts: int,
) -> Bool[np.ndarray, " N"]:
    """Payments of entities that were compromised at the time; that begins on random days and lasts a while."""
    begins = rng.random((count, days)) < share / lasts
    ever = np.concatenate([np.zeros((count, lasts), int), np.cumsum(begins, axis=1)], axis=1)
    within = ever[:, lasts:] > ever[:, :days]
    return within[entity, (seconds - START) // DAY]


def attainable_recall(
    table: Transactions, rows: Int64[np.ndarray, " B"], delay: int, false_positive_rate: float
) -> dict[str, float]:
    """The most that a reader of a payment's history and note can catch: some frauds leave no trace.

    A trace in the numbers is an amount far from the customer's own, such an amount earlier in the two weeks that a
    leaked card is in use, or a confirmed fraud of the customer in that time or at the terminal in its four weeks. A
    trace in the note is an alarming wording. What leaves none is met by chance at the false-positive rate, or by as
    many vague notes as that rate allows.

    Args:
      table: From `simulate`.
      rows: The payments that are judged.
      delay: Seconds until a label is known.
      false_positive_rate: At which recall is counted.

    Returns:
      By mode: "both", "transactions", "text". An upper bound; NaN without fraud.
    """
    rows = rows[table.fraud[rows] == 1]
    if not len(rows):
        return dict.fromkeys(("both", "transactions", "text"), float("nan"))
    numbers, note = (table.shown[rows] & 1) > 0, (table.shown[rows] & 2) > 0
    for entity, days, striking in (
        (table.terminal, TERMINAL_DAYS, np.zeros(len(table), bool)),
        (table.customer, CUSTOMER_DAYS, (table.shown & 1) > 0),
    ):
        before, valid = last_rows(index_by(entity), rows, 16 * days)
        since = table.seconds[rows][:, None] - table.seconds[before]
        told = striking[before] | ((table.fraud[before] == 1) & (since >= delay))
        numbers |= (valid & told & (since > 0) & (since < days * DAY)).any(axis=1)
    vague = vague_odds()
    return {
        mode: float(seen.mean() + min(1.0, factor * false_positive_rate) * (1 - seen.mean()))
        for mode, seen, factor in (("both", numbers | note, vague), ("transactions", numbers, 1), ("text", note, vague))
    }
