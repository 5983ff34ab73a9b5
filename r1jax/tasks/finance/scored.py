"""What is known of every transaction of a scored period, beside what the model says of it."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64

from r1jax.data.transactions import DAY


class ScoredTransactions(NamedTuple):
    """N transactions in order of time.

    Attributes:
      ids: Names of the transactions.
      seconds: Since the epoch.
      amount: In the currency of the data.
      customer: Number of the customer, whose card is meant where a card is spoken of.
      terminal: Number of the terminal.
      fraud: 1 or 0; NaN where the label is not known yet.
      scenario: Of simulated data: 0 genuine, 1 and above the kind of fraud; None elsewhere.
      score: Fused probability from the model, before calibration.
    """

    ids: list[str]
    seconds: Int64[np.ndarray, "N"]
    amount: Float32[np.ndarray, "N"]
    customer: Int64[np.ndarray, "N"]
    terminal: Int64[np.ndarray, "N"]
    fraud: Float32[np.ndarray, "N"]
    scenario: Int64[np.ndarray, "N"] | None
    score: Float32[np.ndarray, "N"]

    @property
    def day(self) -> Int64[np.ndarray, "N"]:
        """Number of the day (UTC) of each transaction, counted from the first transaction's."""
        days = self.seconds // DAY
        return days - (days[0] if len(days) else 0)

    @property
    def days(self) -> int:
        """Days from the first transaction to the last, both included."""
        return int(self.day[-1]) + 1 if len(self.seconds) else 0

    @property
    def labelled(self) -> Bool[np.ndarray, "N"]:
        """Which labels are known."""
        return ~np.isnan(self.fraud)

    def part(self, chosen: Bool[np.ndarray, "N"]) -> "ScoredTransactions":
        """The chosen transactions, in the same order."""
        return ScoredTransactions(
            [name for name, keep in zip(self.ids, chosen, strict=True) if keep],
            *(None if column is None else column[chosen] for column in self[1:]),
        )
