"""From a score to a band and a recommended action; the thresholds are validated config, never fitted on what is scored.

A band is decided by the raw score, because calibration may give neighbouring scores one probability; only the
recommendation to block asks for a probability.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from r1jax.config import AlertConfig
from r1jax.tasks.finance.operating import OperatingCurve

Band = Literal["low", "elevated", "high", "critical"]
Action = Literal["approve", "step-up", "review", "block"]
BANDS: tuple[Band, ...] = ("low", "elevated", "high", "critical")
ACTIONS: tuple[Action, ...] = ("approve", "step-up", "review", "block")
"""One for each band."""
ALERT = 2
"""The first band that is an alert."""


class Policy(NamedTuple):
    """Thresholds of the bands, and what the alert threshold yielded on validation."""

    step_up: float
    review: float
    """Scores from which a transaction is elevated, and an alert."""
    block: float
    """Probability from which an alert is critical."""
    recall: float
    false_positive_rate: float
    n_positive: int
    n_negative: int
    origin: str
    """How the alert threshold was chosen."""

    def bands(self, score: Shaped[np.ndarray, "n"], probability: Shaped[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
        """Index into `BANDS` and `ACTIONS` of each transaction.

        Args:
          score: Before calibration.
          probability: After it.

        Returns:
          0 to 3.
        """
        score = score.astype(np.float64)  # beside fp32 scores NumPy would round a threshold, maybe down to a score
        alert = score >= self.review
        return (score >= self.step_up).astype(np.int64) + alert + (alert & (probability >= self.block))


def make_policy(curve: OperatingCurve, settings: AlertConfig) -> Policy:
    """Sets the thresholds.

    Args:
      curve: Of the validation transactions.
      settings: Budgets.

    Returns:
      The policy.
    """
    if settings.false_positive_rate is None:
        review = curve.for_alerts(settings.per_day)
        origin = f"{settings.per_day:g} alerts a day on validation"
    else:
        review = curve.for_rate(settings.false_positive_rate)
        kept = curve.at(review)[1]
        origin = f"false positive rate of at most {settings.false_positive_rate:.3%} on validation ({kept:.3%} there)"
    recall, rate = curve.at(review)
    step_up = min(review, curve.for_alerts(settings.step_up_per_day))
    return Policy(step_up, review, settings.block_probability, recall, rate, curve.n_positive, curve.n_negative, origin)
