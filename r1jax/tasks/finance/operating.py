"""What validation fixes for later transactions: thresholds for any budget of alerts, and the calibration.

Both are plain numbers that travel with the checkpoint, in its `validation`, as every task's operating points do.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from r1jax.errors import UserError
from r1jax.tasks import calibration
from r1jax.tasks.metrics import rank

POINTS = 200
"""Thresholds kept, evenly spread over the logarithm of the number of alerts."""


class OperatingCurve(NamedTuple):
    """What each of some thresholds yielded on validation, from one alert to all transactions."""

    threshold: tuple[float, ...]
    alerts_per_day: tuple[float, ...]
    false_positive_rate: tuple[float, ...]
    recall: tuple[float, ...]
    n_positive: int
    n_negative: int

    def for_alerts(self, per_day: float) -> float:
        """The threshold that raised this many alerts a day."""
        return _between(self.alerts_per_day, self.threshold, per_day)

    def for_rate(self, rate: float) -> float:
        """The threshold that kept this false positive rate."""
        return _between(self.false_positive_rate, self.threshold, rate)

    def at(self, threshold: float) -> tuple[float, float]:
        """Recall and false positive rate of a threshold."""
        rising = [-x for x in self.threshold]
        recall, rate = (float(np.interp(-threshold, rising, y)) for y in (self.recall, self.false_positive_rate))
        return recall, rate


def _between(x: tuple[float, ...], threshold: tuple[float, ...], wanted: float) -> float:
    """Interpolates the threshold; where several have the same x, the lowest of them counts."""
    last = np.append(np.diff(x) > 0, True)
    return float(np.interp(wanted, np.array(x)[last], np.array(threshold)[last]))


def operating_curve(fraud: Shaped[np.ndarray, "n"], score: Float[np.ndarray, "n"], days: int) -> OperatingCurve:
    """Measures thresholds on validation.

    A threshold lies midway between two scores, so that rounding on another device turns no transaction round.

    Args:
      fraud: 1 or 0.
      score: Probabilities of the same transactions, before calibration.
      days: Over which they spread.

    Returns:
      The curve.

    Raises:
      UserError: There is no fraud, or nothing else.
    """
    ranking = rank(fraud, score)
    tp, fp = ranking.true_positives[0], ranking.false_positives[0]
    if not tp[-1] or not fp[-1]:
        raise UserError(
            f"the validation period has {int(tp[-1])} frauds among {len(fraud)} transactions with a known label: "
            "thresholds need both kinds; choose a longer period"
        )
    alerts = tp + fp
    wanted = np.geomspace(1, alerts[-1], POINTS)
    index = np.unique(np.clip(np.searchsorted(alerts, wanted + 1e-6) - 1, 1, None))
    below = np.append(ranking.thresholds[1:], 0.0)
    threshold = np.where(index < len(alerts) - 1, ranking.thresholds[index] / 2 + below[index] / 2, 0.0)
    columns = (threshold, alerts[index] / days, fp[index] / fp[-1], tp[index] / tp[-1])
    return OperatingCurve(*(tuple(column.tolist()) for column in columns), int(tp[-1]), int(fp[-1]))


def operating_points(
    fraud: Shaped[np.ndarray, "n"], score: Float[np.ndarray, "n"], days: int, kind: str
) -> dict[str, dict[str, Any]]:
    """What is stored with a checkpoint.

    Args:
      fraud: 1 or 0; NaN where unknown, which is left out.
      score: Probabilities of the validation transactions, before calibration.
      days: Over which they spread.
      kind: "isotonic" or "platt".

    Returns:
      "curve" and "calibration", as JSON; empty where nothing can be set.
    """
    known = ~np.isnan(fraud)
    fraud, score = fraud[known], score[known].astype(np.float64)
    if not 0 < fraud.sum() < len(fraud):
        return {}
    fit = calibration.fit_isotonic if kind == "isotonic" else calibration.fit_platt
    curve = operating_curve(fraud, score, days)
    return {
        "curve": {name: list(x) if isinstance(x, tuple) else x for name, x in curve._asdict().items()},
        "calibration": calibration.to_json(fit(fraud, score)),
    }


def stored_curve(stored: dict[str, Any]) -> OperatingCurve:
    """The curve that `operating_points` stored."""
    return OperatingCurve(**{name: tuple(x) if isinstance(x, list) else x for name, x in stored.items()})
