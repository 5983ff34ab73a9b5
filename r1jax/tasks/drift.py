"""Whether later data still looks like that of an evaluation: a snapshot, distances to it, a threshold that follows.

A snapshot is small JSON of quantiles and counts; it holds no row.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

SKETCH = 1001
"""Quantiles kept of each column: distances are exact to about a thousandth."""
BINS = 10
STEP = 0.1
"""Log-odds that a followed threshold moves by at most, for one transaction."""


def snapshot(columns: dict[str, Shaped[np.ndarray, "n"]], sketch: int = SKETCH) -> dict[str, Any]:
    """Describes columns of numbers.

    Args:
      columns: By name; NaN is missing.
      sketch: Quantiles kept of each.

    Returns:
      For each: how many rows, how many of them are missing, its quantiles, and the edges and shares of at most `BINS`
      bins of about equally many rows.
    """
    described = {}
    for name, column in columns.items():
        known = column[~np.isnan(column)].astype(np.float64)
        quantiles = np.quantile(known, np.linspace(0, 1, sketch)) if len(known) else np.zeros(0)
        edges = np.unique(np.quantile(known, np.linspace(0, 1, BINS + 1)[1:-1])) if len(known) else np.zeros(0)
        described[name] = {
            "rows": len(column),
            "missing": len(column) - len(known),
            "quantiles": quantiles.tolist(),
            "edges": edges.tolist(),
            "counts": _counts(column, edges).tolist(),
        }
    return described


def _counts(column: Shaped[np.ndarray, "n"], edges: Float[np.ndarray, "e"]) -> Shaped[np.ndarray, "b"]:
    """Rows of each bin, which ends with its upper edge, and last the missing ones."""
    known = column[~np.isnan(column)]
    inside = np.bincount(np.searchsorted(edges, known.astype(np.float64), side="left"), minlength=len(edges) + 1)
    return np.append(inside, len(column) - len(known))


def stability_index(before: Shaped[np.ndarray, "b"], after: Shaped[np.ndarray, "b"]) -> float:
    """Population stability index: the symmetric relative entropy of the shares of the bins.

    Half a row is added to every bin, so that one which was or became empty counts much, but not without limit.

    Args:
      before: Rows of each bin.
      after: Rows of the same bins later.

    Returns:
      0 for the same shares; above 0.1 some, above 0.2 much drift by the usual reading.
    """
    p, q = (((x + 0.5) / (x.sum() + 0.5 * len(x))) for x in (before, after))
    return float(np.sum((q - p) * np.log(q / p)))


def kolmogorov_smirnov(quantiles: Float[np.ndarray, "q"], later: Shaped[np.ndarray, "n"]) -> float:
    """Largest distance between the distribution functions of a sketch and of later numbers; NaN without numbers."""
    if not len(quantiles) or not len(later):
        return math.nan
    later = np.sort(later.astype(np.float64))
    at = np.concatenate([quantiles, later])
    shares = (np.searchsorted(x, at, side="right") / len(x) for x in (np.sort(quantiles), later))
    return float(np.abs(np.subtract(*shares)).max())


class Drift(NamedTuple):
    """How far a column has moved."""

    name: str
    psi: float
    ks: float
    median_before: float
    median_after: float
    missing_after: float
    """Share of the rows."""


def drifts(before: dict[str, Any], columns: dict[str, Shaped[np.ndarray, "n"]]) -> list[Drift]:
    """Compares later columns with a snapshot.

    Args:
      before: From `snapshot`.
      columns: The same columns later.

    Returns:
      One entry a column, the largest index first.
    """
    found = []
    for name, old in before.items():
        column, quantiles = columns[name], np.array(old["quantiles"])
        known = column[~np.isnan(column)]
        counts = _counts(column, np.array(old["edges"]))
        middle = float(np.median(known)) if len(known) else math.nan
        found.append(
            Drift(
                name,
                stability_index(np.array(old["counts"]), counts),
                kolmogorov_smirnov(quantiles, known),
                float(np.median(quantiles)) if len(quantiles) else math.nan,
                middle,
                1 - len(known) / max(len(column), 1),
            )
        )
    return sorted(found, key=lambda drift: -drift.psi)


@dataclass
class ThresholdFollower:
    """Keeps the share of alerts by moving the threshold a little after each score; its state is one number.

    After n scores the share of alerts is the wanted one plus (moved / (step n)), where `moved` is how far the threshold
    has come in log-odds: whatever the scores do, the share is kept in the long run (Gibbs and Candes 2021, section 2).

    Attributes:
      log_odds: The threshold.
      share: Of the scores that shall be alerts.
      step: Log-odds that the threshold rises by at an alert, less its fall.
    """

    log_odds: float
    share: float
    step: float = STEP

    @property
    def threshold(self) -> float:
        """The threshold as a score."""
        return 1 / (1 + math.exp(-self.log_odds))

    def __call__(self, score: float) -> bool:
        """Says whether a score is an alert, and moves the threshold."""
        kept = min(max(score, 1e-12), 1 - 1e-12)
        alert = math.log(kept) - math.log1p(-kept) >= self.log_odds
        self.log_odds += self.step * (alert - self.share)
        return alert


def follow(threshold: float, share: float) -> ThresholdFollower:
    """A follower that begins at a threshold between 0 and 1."""
    kept = min(max(threshold, 1e-12), 1 - 1e-12)
    return ThresholdFollower(math.log(kept) - math.log1p(-kept), share)
