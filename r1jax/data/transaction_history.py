"""What is known at a payment: the last events of its customer and terminal, and sums over windows of time.

A payment's label is known `delay` seconds after it. Nothing here depends on a label that is younger than that, or on
anything that came after the payment itself.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int8, Int64

from r1jax.data.transaction_index import Index, ends, index_by, last_rows
from r1jax.data.transaction_summaries import SUMMARIES, summaries
from r1jax.data.transactions import DAY, HORIZON, UNITS, Transactions
from r1jax.errors import UserError

WINDOWS = (1, 7, 30)
"""Days."""
HANDBOOK = (
    "amount",
    "weekend",
    "night",
    *(f"customer_{what}_{days}d" for days in WINDOWS for what in ("count", "mean")),
    *(f"terminal_{what}_{days}d" for days in WINDOWS for what in ("count", "risk")),
)
"""The fifteen of the Fraud Detection Handbook (chapter 3, baseline feature transformation)."""
FEATURES = (*HANDBOOK, *SUMMARIES)
"""What the model's table holds."""
CHANNELS = ("amount", "customer_usual", "terminal_risk", "second_of_day", "weekday", "gap", "age")
"""Numbers of each event of a stream; "gap" and "age" are seconds since the event before it and until the payment."""
NO_GAP = 1e8
"""Gap of the first event of a stream, seconds."""
UNKNOWN, GENUINE, FRAUD = range(3)
"""What is known of an event's label."""


def check_delay(delay: int) -> None:
    """Raises UserError where a payment would see its own label."""
    if delay < 1:
        raise UserError(f"the label delay is {delay} seconds, but it must be at least 1: a label is known later only")


def window_features(table: Transactions, delay: int) -> Float32[np.ndarray, "N F"]:
    """`HANDBOOK` of every payment.

    Per customer over (t - w, t], this payment included: count and mean amount. Per terminal over
    (t - delay - w, t - delay]: count, and the share of fraud of those whose label is known (0 where there is none).
    Weekends are Saturday and Sunday; nights end at 7.

    Args:
      table: The payments.
      delay: Seconds until a label is known.

    Returns:
      One row a payment.
    """
    found = np.empty((len(table), len(HANDBOOK)), np.float32)
    day, second = np.divmod(table.seconds, DAY)
    found[:, 0], found[:, 1], found[:, 2] = table.amount, (day + 3) % 7 >= 5, second < 7 * 3600
    index = index_by(table.customer)
    here = np.arange(len(table)) + 1
    money = np.append(0, np.cumsum(table.money[index.order]))
    for i, days in enumerate(WINDOWS):
        begin = ends(index, table.customer, table.seconds, days * DAY)
        count = here - begin
        found[index.order, 3 + 2 * i] = count
        found[index.order, 4 + 2 * i] = (money[here] - money[begin]) / (count * UNITS)
    index = index_by(table.terminal)
    frauds, known = (np.append(0, np.cumsum(x[index.order])) for x in (table.fraud == 1, ~np.isnan(table.fraud)))
    until = ends(index, table.terminal, table.seconds, delay)
    for i, days in enumerate(WINDOWS):
        begin = ends(index, table.terminal, table.seconds, delay + days * DAY)
        found[index.order, 9 + 2 * i] = until - begin
        judged = known[until] - known[begin]
        found[index.order, 10 + 2 * i] = (frauds[until] - frauds[begin]) / np.maximum(judged, 1)
    return found


class Streams(NamedTuple):
    """Events before and at each of B payments: of its customer (stream 0) and of its terminal (stream 1)."""

    numbers: Float32[np.ndarray, "B 2 K C"]
    """`CHANNELS`."""
    states: Int8[np.ndarray, "B 2 K"]
    """`UNKNOWN`, `GENUINE` or `FRAUD`, as it was known at the payment."""
    valid: Bool[np.ndarray, "B 2 K"]
    """False where the stream is shorter; numbers and states are 0 there."""


class History:
    """Gathers streams and features of any rows of a table."""

    def __init__(self, table: Transactions, delay: int, events: int) -> None:
        """Sorts the table by customer and by terminal once; holds a few dozen bytes a row.

        Args:
          table: The payments.
          delay: Seconds until a label is known.
          events: K, of each stream.

        Raises:
          UserError: The delay is less than a second: a payment would see its own label.
        """
        check_delay(delay)
        self.seconds, self.delay, self.events = table.seconds, delay, events
        summed, _ = summaries(table, delay)
        self.features = np.concatenate([window_features(table, delay), summed], axis=1)
        state = np.where(np.isnan(table.fraud), UNKNOWN, np.where(table.fraud == 1, FRAUD, GENUINE))
        self._state = state.astype(np.int8)
        day, second = np.divmod(table.seconds, DAY)
        usual, risk = FEATURES.index("customer_usual"), FEATURES.index("terminal_risk_30d")
        own = [table.amount, self.features[:, usual], self.features[:, risk], second, (day + 3) % 7]
        self._own = np.stack(own, axis=1).astype(np.float32)
        self._indices = tuple(index_by(entity) for entity in (table.customer, table.terminal))
        self._gaps = [self._gap(index) for index in self._indices]

    def _gap(self, index: Index) -> Float32[np.ndarray, " N"]:
        ordered = self.seconds[index.order]
        gap = np.append(NO_GAP, np.diff(ordered)).astype(np.float32)
        gap[index.first] = NO_GAP
        return np.where(gap > HORIZON, np.float32(NO_GAP), gap)[index.place]

    def streams(self, rows: Int64[np.ndarray, " B"]) -> Streams:
        """What is known of the last events.

        Args:
          rows: Of the payments.

        Returns:
          Both streams, in the order of time, the payment itself last; no event is older than `HORIZON`.
        """
        shape = (len(rows), 2, self.events)
        found = Streams(np.zeros((*shape, len(CHANNELS)), np.float32), np.zeros(shape, np.int8), np.zeros(shape, bool))
        now = self.seconds[rows][:, None]
        for i, (index, gap) in enumerate(zip(self._indices, self._gaps, strict=True)):
            events, valid = last_rows(index, rows, self.events)
            then = self.seconds[events]
            valid &= now - then <= HORIZON
            found.numbers[:, i, :, :-2] = self._own[events]
            found.numbers[:, i, :, -2] = gap[events]
            found.numbers[:, i, :, -1] = now - then
            found.numbers[:, i][~valid] = 0
            found.states[:, i] = np.where(valid & (then + self.delay <= now), self._state[events], UNKNOWN)
            found.valid[:, i] = valid
        return found
