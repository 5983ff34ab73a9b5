"""What an investigator would sum up of both streams: the habits of a customer, and the state of a terminal's labels.

An amount is large where it is above `LARGE` times what the customer usually pays. A fraud of a large amount tells of
the card, any other tells of the terminal. Each summary stands in two forms that agree bit for bit: of a whole table,
and of the payment that comes next, from what is held of its customer and its terminal.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from r1jax.data.transaction_index import Index, ends, index_by, last_rows
from r1jax.data.transactions import DAY, HORIZON, Transactions

HABIT = 64
"""Earlier payments of a customer that tell what is usual, where they are not older than `HORIZON`."""
LARGE = 2.5
LARGE_DAYS = (3, 7, 14)
LOOK = 30
"""Days that the rest looks back; where labels count, before those that are not known yet."""
CENT = np.float32(0.01)
"""Ratios are to at least this."""
CUSTOMER = (
    "customer_usual",
    "customer_ratio",
    "customer_ratio_high",
    *(f"customer_large_count_{days}d" for days in LARGE_DAYS),
    "customer_large_last_days",
    "customer_large_first_days",
    "customer_genuine_count",
    "customer_fraud_count",
    "customer_fraud_last_days",
    "customer_fraud_first_days",
)
"""Median of the last `HABIT` earlier amounts, the amount over that and over their 90 % quantile (of a first payment its
own amount, 1 and 1). Earlier large payments: how many; days since the newest of `LOOK` and the oldest of 14 days; how
many are known to be genuine, how many to be fraud, days since the newest and the oldest of the latter."""
TERMINAL = (
    "terminal_fraud_count",
    "terminal_fraud_last_days",
    "terminal_fraud_first_days",
    "terminal_genuine_last_days",
    "terminal_genuine_count",
    "terminal_genuine_before_days",
    "terminal_unlabelled_count",
)
"""Known frauds that were not large: how many, days since the newest and the oldest. Known genuine payments: days since
the newest, how many came after the newest of those frauds, days since the newest that came before the oldest of them.
Payments too young for a label. Where there is no such payment, as many days as are looked back at."""
SUMMARIES = (*CUSTOMER, *TERMINAL)


class Marks(NamedTuple):
    """Which rows of a table are of a kind, by place of an index."""

    last: Int64[np.ndarray, " N+1"]
    """Of each place, the newest marked place before it; -1 where there is none."""
    next: Int64[np.ndarray, " N+1"]
    """The oldest marked place from it on; N where there is none."""
    before: Int64[np.ndarray, " N+1"]
    """How many lie before it."""


def _marks(marked: Bool[np.ndarray, " N"]) -> Marks:
    count, places = len(marked), np.arange(len(marked))
    newest = np.maximum.accumulate(np.where(marked, places, -1))
    oldest = np.minimum.accumulate(np.where(marked, places, count)[::-1])[::-1]
    return Marks(np.append(-1, newest), np.append(oldest, count), np.append(0, np.cumsum(marked)))


def habits(table: Transactions, index: Index) -> Float32[np.ndarray, "N 2"]:
    """Median and 90 % quantile of the last `HABIT` earlier amounts of each payment's customer, within `HORIZON`.

    Args:
      table: The payments.
      index: Of the customers.

    Returns:
      Both; of a customer's first payment its own amount.
    """
    found = np.empty((len(table), 2), np.float32)
    for start in range(0, len(table), 1 << 16):  # so that the amounts of few rows are held at a time
        rows = np.arange(start, min(len(table), start + (1 << 16)))
        earlier, valid = last_rows(index, rows, HABIT + 1)
        valid &= table.seconds[rows][:, None] - table.seconds[earlier] <= HORIZON
        amounts = np.sort(np.where(valid, table.amount[earlier], np.float32(np.inf))[:, :-1], axis=1)
        count = valid[:, :-1].sum(axis=1)
        for i, place in enumerate((count // 2, count * 9 // 10)):
            found[rows, i] = np.where(count > 0, amounts[np.arange(len(rows)), place], table.amount[rows])
    return found


def summaries(table: Transactions, delay: int) -> tuple[Float32[np.ndarray, "N F"], Bool[np.ndarray, " N"]]:
    """`SUMMARIES` of every payment.

    Args:
      table: The payments.
      delay: Seconds until a label is known.

    Returns:
      One row a payment, and which of them are large.
    """
    found = np.empty((len(table), len(SUMMARIES)), np.float32)
    customer, terminal = index_by(table.customer), index_by(table.terminal)
    habit = habits(table, customer)
    ratio = table.amount[:, None] / np.maximum(habit, CENT)
    found[:, 0], found[:, 1:3], large = habit[:, 0], ratio, ratio[:, 0] > LARGE
    found[customer.order, 3 : len(CUSTOMER)] = _of_customers(table, customer, large, delay)
    found[terminal.order, len(CUSTOMER) :] = _of_terminals(table, terminal, large, delay)
    return found, large


def _days(
    seconds: Int64[np.ndarray, " N"], place: Int64[np.ndarray, " N"], found: Bool[np.ndarray, " N"], none: float
) -> Float64[np.ndarray, " N"]:
    """Days since the event at a place; `none` where nothing was found."""
    return np.where(found, (seconds - seconds[np.where(found, place, 0)]) / DAY, none)


def _of_customers(
    table: Transactions, index: Index, large: Bool[np.ndarray, " N"], delay: int
) -> Float64[np.ndarray, "N 9"]:
    """The rest of `CUSTOMER`, by place."""
    seconds, here = table.seconds[index.order], np.arange(len(table))
    begin = {days: ends(index, table.customer, table.seconds, days * DAY) for days in (*LARGE_DAYS, LOOK)}
    unusual, fraud = _marks(large[index.order]), _marks((large & (table.fraud == 1))[index.order])
    genuine = _marks((large & (table.fraud == 0))[index.order])
    columns: list[np.ndarray] = [unusual.before[here] - unusual.before[begin[days]] for days in LARGE_DAYS]
    newest, oldest = unusual.last[here], unusual.next[begin[LARGE_DAYS[-1]]]
    columns += [_days(seconds, newest, newest >= begin[LOOK], float(LOOK))]
    columns += [_days(seconds, oldest, oldest < here, float(LARGE_DAYS[-1]))]
    until, since = _known(index, table.customer, table.seconds, delay)
    columns += [marks.before[until] - marks.before[since] for marks in (genuine, fraud)]
    newest, oldest, none = fraud.last[until], fraud.next[since], LOOK + delay / DAY
    columns += [_days(seconds, newest, newest >= since, none), _days(seconds, oldest, oldest < until, none)]
    return np.stack(columns, axis=1)


def _of_terminals(
    table: Transactions, index: Index, large: Bool[np.ndarray, " N"], delay: int
) -> Float64[np.ndarray, "N 7"]:
    """`TERMINAL`, by place."""
    seconds, here = table.seconds[index.order], np.arange(len(table))
    fraud, genuine = _marks((~large & (table.fraud == 1))[index.order]), _marks((table.fraud == 0)[index.order])
    until, since = _known(index, table.terminal, table.seconds, delay)
    newest, oldest, none = fraud.last[until], fraud.next[since], LOOK + delay / DAY
    any_fraud, good = oldest < until, genuine.last[until]
    before = genuine.last[np.where(any_fraud, oldest, until)]
    columns: list[np.ndarray] = [
        fraud.before[until] - fraud.before[since],
        _days(seconds, newest, any_fraud, none),
        _days(seconds, oldest, any_fraud, none),
        _days(seconds, good, good >= since, none),
        genuine.before[until] - genuine.before[np.maximum(since, newest + 1)],
        _days(seconds, before, any_fraud & (before >= since), none),
        here - until,
    ]
    return np.stack(columns, axis=1)


def _known(
    index: Index, entity: np.ndarray, seconds: Int64[np.ndarray, " N"], delay: int
) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " N"]]:
    """For each place, the places after and of the labels that count."""
    return ends(index, entity, seconds, delay), ends(index, entity, seconds, delay + LOOK * DAY)


class Held(NamedTuple):
    """What is held of one customer or terminal: its events in the order of time."""

    seconds: Int64[np.ndarray, " N"]
    amount: Float32[np.ndarray, " N"]
    large: Bool[np.ndarray, " N"]
    fraud: Bool[np.ndarray, " N"]
    """Which of them turned out to be fraud."""
    genuine: Bool[np.ndarray, " N"]


def customer_now(held: Held, now: int, amount: np.float32, delay: int) -> tuple[list[float], bool]:
    """`CUSTOMER` of the payment that comes next.

    Args:
      held: Of its customer: at least the last `HABIT` earlier events and those that `LOOK` and the delay reach.
      now: Its time.
      amount: Its amount.
      delay: Seconds until a label is known.

    Returns:
      The summaries, and whether the payment is large.
    """
    oldest = max(len(held.seconds) - HABIT, int(np.searchsorted(held.seconds, now - HORIZON)))
    earlier = np.sort(held.amount[oldest:])
    n = len(earlier)
    usual, high = (earlier[n // 2], earlier[n * 9 // 10]) if n else (amount, amount)
    ratio = amount / np.maximum(usual, CENT)
    begins = [now - days * DAY for days in (*LARGE_DAYS, LOOK)]
    *lately, month = np.searchsorted(held.seconds, begins, side="right")
    large = np.flatnonzero(held.large)
    numbers = [len(large) - int(np.searchsorted(large, begin)) for begin in lately]
    until, since = _known_now(held, now, delay)
    judged = large[(large >= since) & (large < until)]
    frauds, none = judged[held.fraud[judged]], LOOK + delay / DAY
    age = lambda row: (now - held.seconds[row]) / DAY  # noqa: E731
    found = [
        float(usual),
        float(ratio),
        float(amount / np.maximum(high, CENT)),
        *map(float, numbers),
        age(large[-1]) if len(large) and large[-1] >= month else float(LOOK),
        age(large[-numbers[-1]]) if numbers[-1] else float(LARGE_DAYS[-1]),
        float(held.genuine[judged].sum()),
        float(len(frauds)),
        *((age(frauds[-1]), age(frauds[0])) if len(frauds) else (none, none)),
    ]
    return found, bool(ratio > LARGE)


def terminal_now(held: Held, now: int, delay: int) -> list[float]:
    """`TERMINAL` of the payment that comes next.

    Args:
      held: Of its terminal: at least the events that `LOOK` and the delay reach.
      now: Its time.
      delay: Seconds until a label is known.

    Returns:
      The summaries.
    """
    until, since = _known_now(held, now, delay)
    known = slice(since, until)
    frauds = since + np.flatnonzero(held.fraud[known] & ~held.large[known])
    genuine = since + np.flatnonzero(held.genuine[known])
    none = LOOK + delay / DAY
    before = genuine[genuine < frauds[0]] if len(frauds) else genuine[:0]
    age = lambda rows, place: (now - held.seconds[rows[place]]) / DAY if len(rows) else none  # noqa: E731
    return [
        float(len(frauds)),
        age(frauds, -1),
        age(frauds, 0),
        age(genuine, -1),
        float((genuine > frauds[-1]).sum()) if len(frauds) else float(len(genuine)),
        age(before, -1),
        float(len(held.seconds) - until),
    ]


def _known_now(held: Held, now: int, delay: int) -> tuple[int, int]:
    """Places after and of the labels that count."""
    until, since = np.searchsorted(held.seconds, [now - delay, now - delay - LOOK * DAY], side="right")
    return int(until), int(since)
