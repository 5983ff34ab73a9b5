"""What validation fixes for later transactions: thresholds for any budget of alerts, and the calibration.

Both are plain numbers that travel with the checkpoint, in its `validation`, as every task's operating points do.
"""

from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, Shaped

from r1jax.data.transaction_history import FEATURES
from r1jax.data.transactions import DAY
from r1jax.errors import UserError
from r1jax.tasks import calibration
from r1jax.tasks.drift import snapshot
from r1jax.tasks.metrics import checked

POINTS = 200
"""Thresholds kept, evenly spread over the logarithm of the number of alerts."""
QUANTILES = 101
"""Of each column of the reference, which every checkpoint carries: KS distances to it are exact to a hundredth."""
NEVER = float(np.nextafter(np.float32(1), np.float32(2)))
"""A threshold that no probability reaches."""


class OperatingCurve(NamedTuple):
    """What each of some thresholds yielded on validation, from one alert to all transactions."""

    threshold: tuple[float, ...]
    alerts_per_day: tuple[float, ...]
    false_positive_rate: tuple[float, ...]
    recall: tuple[float, ...]
    n_positive: int
    n_negative: int

    def for_alerts(self, per_day: float) -> float:
        """The threshold that raised this many alerts a day; where several did, the lowest of them."""
        last = np.append(np.diff(self.alerts_per_day) > 0, True)
        return float(np.interp(per_day, np.array(self.alerts_per_day)[last], np.array(self.threshold)[last]))

    def for_rate(self, rate: float) -> float:
        """The lowest threshold kept whose false positive rate was at most this; `NEVER` where none was."""
        within = int(np.searchsorted(self.false_positive_rate, rate * (1 + 1e-9), side="right"))
        return self.threshold[within - 1] if within else NEVER

    def at(self, threshold: float) -> tuple[float, float]:
        """Recall and false positive rate of a threshold."""
        if threshold >= NEVER:
            return 0.0, 0.0
        rising = [-x for x in self.threshold]
        recall, rate = (float(np.interp(-threshold, rising, y)) for y in (self.recall, self.false_positive_rate))
        return recall, rate

    def alerts_at(self, threshold: float) -> float:
        """Alerts a day of a threshold."""
        if threshold >= NEVER:
            return 0.0
        return float(np.interp(-threshold, [-x for x in self.threshold], self.alerts_per_day))


def operating_curve(fraud: Shaped[np.ndarray, "n"], score: Float[np.ndarray, "n"], days: int) -> OperatingCurve:
    """Measures thresholds on validation: alerts of all transactions, recall and rate of those with a known label.

    A threshold lies midway between two scores, so that rounding on another device turns no transaction round.

    Args:
      fraud: 1 or 0; NaN where unknown.
      score: Probabilities of the same transactions, before calibration.
      days: Over which they spread.

    Returns:
      The curve.

    Raises:
      UserError: There is no known fraud, or no known genuine transaction, or a score is not finite.
    """
    _, score = checked(np.nan_to_num(fraud), score)
    levels = np.unique(score)[::-1]
    alerts, tp, fp = (_at_or_above(score[chosen], levels) for chosen in (slice(None), fraud == 1, fraud == 0))
    if not tp[-1] or not fp[-1]:
        raise UserError(
            f"the validation period has {int(tp[-1])} frauds among {int(tp[-1] + fp[-1])} transactions with a known "
            "label: thresholds need both kinds; choose a longer period"
        )
    wanted = np.geomspace(1, alerts[-1], POINTS)
    index = np.unique(np.clip(np.searchsorted(alerts, wanted + 1e-6) - 1, 0, None))
    below = np.append(levels[1:], 0.0)
    threshold = np.where(index < len(alerts) - 1, levels[index] / 2 + below[index] / 2, 0.0)
    columns = (threshold, alerts[index] / days, fp[index] / fp[-1], tp[index] / tp[-1])
    return OperatingCurve(*(tuple(column.tolist()) for column in columns), int(tp[-1]), int(fp[-1]))


def _at_or_above(score: Float[np.ndarray, "n"], levels: Float[np.ndarray, "K"]) -> Int[np.ndarray, "K"]:
    return len(score) - np.searchsorted(np.sort(score), levels)


def operating_points(
    fraud: Shaped[np.ndarray, "n"], score: Float[np.ndarray, "n"], days: int, kind: str
) -> dict[str, dict[str, Any]]:
    """What is stored with a checkpoint.

    Args:
      fraud: 1 or 0; NaN where unknown, which counts as an alert and is otherwise left out.
      score: Probabilities of the validation transactions, before calibration.
      days: Over which they spread.
      kind: "isotonic" or "platt".

    Returns:
      "curve" and "calibration", as JSON; empty where nothing can be set.
    """
    known, score = ~np.isnan(fraud), score.astype(np.float64)
    if not 0 < fraud[known].sum() < known.sum():
        return {}
    fit = calibration.fit_isotonic if kind == "isotonic" else calibration.fit_platt
    curve = operating_curve(fraud, score, days)
    return {
        "curve": {name: list(x) if isinstance(x, tuple) else x for name, x in curve._asdict().items()},
        "calibration": calibration.to_json(fit(fraud[known], score[known])),
    }


def stored_curve(stored: dict[str, Any]) -> OperatingCurve:
    """The curve that `operating_points` stored."""
    return OperatingCurve(**{name: tuple(x) if isinstance(x, list) else x for name, x in stored.items()})


def reference(
    features: Float32[np.ndarray, "n F"], score: Float32[np.ndarray, "n"], day: Int[np.ndarray, "n"]
) -> dict[str, Any]:
    """What validation looked like, for later periods to be held against (`r1jax monitor`).

    Args:
      features: `FEATURES` of each transaction.
      score: Before calibration.
      day: Since the epoch.

    Returns:
      "period" and "columns" as in an evaluation's snapshot, with fewer quantiles; JSON.
    """
    columns = {name: features[:, i] for i, name in enumerate(FEATURES)} | {"score": score}
    first, last = int(day.min()), int(day.max())
    named = (datetime.fromtimestamp(DAY * x, UTC).strftime("%Y-%m-%d") for x in (first, last))
    period = {"transactions": len(score)} | dict(zip(("first_day", "last_day"), named, strict=True))
    return {"period": period | {"days": last - first + 1}, "columns": snapshot(columns, QUANTILES)}
