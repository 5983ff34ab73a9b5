"""What an engineer would tell gradient boosting of both streams: the state of a terminal's labels, a customer's habits.

The model reads the events themselves; these numbers give the peer the same information in a form that it can use. All
of them look back: labels count once they are `delay` seconds old.
"""

import bisect
from collections.abc import Iterator

import numpy as np

from r1jax.data.transactions import DAY, Transactions

SUMMARIES = (
    "terminal_fraud_age",
    "terminal_genuine_age",
    "terminal_run_age",
    "terminal_run_frauds",
    "terminal_genuine_since",
    "terminal_genuine_before_run",
    "terminal_unlabelled",
    "customer_ratio_median",
    "customer_median",
    "customer_ratio_high",
    *(f"customer_large_{days}d" for days in (3, 7, 14)),
    "customer_large_age",
    "customer_large_frauds_21d",
    "customer_events",
)
"""Ages in days. A run of frauds at a terminal begins anew after `RUN` days; a customer's large payment is above `LARGE`
times the median of the earlier ones."""
RUN = 28
LARGE = 2.5
OBVIOUS = 220.0
"""Frauds above this amount say nothing of the terminal: they are told by the amount."""


def summaries(table: Transactions, delay: int) -> np.ndarray:
    """`SUMMARIES` of every payment.

    Args:
      table: The payments.
      delay: Seconds until a label is known.

    Returns:
      float32 [N, 16], NaN where there is nothing to tell.
    """
    found = np.full((len(table), len(SUMMARIES)), np.nan, np.float32)
    for rows in _by_entity(table.terminal):
        found[rows, :7] = _of_terminal(table.seconds[rows], table.fraud[rows], table.amount[rows], delay)
    for rows in _by_entity(table.customer):
        found[rows, 7:] = _of_customer(table.seconds[rows], table.fraud[rows], table.amount[rows], delay)
    return found


def _by_entity(entity: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of each entity, in order."""
    order = np.argsort(entity, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(entity[order])) + 1)


def _of_terminal(seconds: np.ndarray, fraud: np.ndarray, amount: np.ndarray, delay: int) -> np.ndarray:
    """What the labels that are known at each payment say, event by event, of the terminal."""
    states = np.full((len(seconds) + 1, 6), np.nan)  # after so many labels
    last = genuine = run = before = np.nan
    frauds = since = 0
    states[0, 3:5] = 0
    for i, (at, label, money) in enumerate(zip(seconds.tolist(), fraud.tolist(), amount.tolist(), strict=True)):
        if label == 1 and money <= OBVIOUS:
            if not frauds or at - run > RUN * DAY:
                run, frauds, before = at, 0, genuine
            frauds, last, since = frauds + 1, at, 0
        elif label == 0:
            genuine, since = at, since + 1
        states[i + 1] = last, genuine, run, frauds, since, before
    known = np.searchsorted(seconds, seconds - delay, side="right")
    seen = states[known]
    age = lambda column: (seconds - seen[:, column]) / DAY  # noqa: E731
    unlabelled = np.arange(len(seconds)) - known
    return np.stack([age(0), age(1), age(2), seen[:, 3], seen[:, 4], age(5), unlabelled], axis=1)


def _of_customer(seconds: np.ndarray, fraud: np.ndarray, amount: np.ndarray, delay: int) -> np.ndarray:
    """How each payment compares with all earlier ones of the customer, and how often that happened lately."""
    count = len(seconds)
    median, high = np.full(count, np.nan), np.full(count, np.nan)
    earlier: list[float] = []
    for i, money in enumerate(amount.tolist()):
        if earlier:
            median[i], high[i] = earlier[len(earlier) // 2], earlier[len(earlier) * 9 // 10]
        bisect.insort(earlier, money)
    ratio = amount / median
    large = np.where(np.isnan(ratio), False, ratio > LARGE)
    place, until = np.arange(count), np.append(0, np.cumsum(large))
    lately = [until[place] - until[np.searchsorted(seconds, seconds - days * DAY, side="right")] for days in (3, 7, 14)]
    times = np.append(np.nan, np.where(large, seconds, np.nan))
    newest = np.append(0, np.maximum.accumulate(np.where(large, place + 1, 0)))[:-1]
    frauds = np.append(0, np.cumsum(large & (fraud == 1)))
    known = np.searchsorted(seconds, seconds - delay, side="right")
    begin = np.minimum(np.searchsorted(seconds, seconds - 21 * DAY, side="right"), known)
    columns = [ratio, median, amount / high, *lately, (seconds - times[newest]) / DAY]
    return np.stack([*columns, frauds[known] - frauds[begin], place], axis=1)
