"""A scored period of transactions, and what follows for each of them."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int

from r1jax.data.transaction_cases import TransactionCases
from r1jax.tasks.finance.alerts import ALERT, Policy
from r1jax.tasks.finance.scored import ScoredTransactions


def typical(score: Float32[np.ndarray, "N"], count: int) -> Int[np.ndarray, "C"]:
    """Transactions of the less suspicious half, at most so many, spread evenly over its scores.

    Args:
      score: Of each.
      count: At most.

    Returns:
      Which.
    """
    quiet = np.argsort(score, kind="stable")[: len(score) // 2 + 1]
    return quiet[np.linspace(0, len(quiet) - 1, min(count, len(quiet))).astype(int)]


class Judged(NamedTuple):
    """A scored period, and what follows for each transaction."""

    cases: TransactionCases
    scored: ScoredTransactions
    scores: dict[str, Float[np.ndarray, "N"]]
    """By mode, before calibration."""
    probability: Float[np.ndarray, "N"]
    policy: Policy
    bands: Int[np.ndarray, "N"]
    warnings: list[str]

    @property
    def alerts(self) -> Int[np.ndarray, "A"]:
        """Transactions that are alerts, in order of time."""
        return np.flatnonzero(self.bands >= ALERT)

    def most_suspicious(self, count: int) -> Int[np.ndarray, "C"]:
        """The alerts of the highest scores, at most so many, the highest first."""
        return self.alerts[np.argsort(-self.scored.score[self.alerts], kind="stable")][:count]

    def typical(self, count: int) -> Int[np.ndarray, "C"]:
        """As `typical` of the scores."""
        return typical(self.scored.score, count)
