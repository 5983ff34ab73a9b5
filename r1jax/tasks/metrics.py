"""Figures of merit of scores and ratings, and their bootstrap intervals, shared by the tasks (NumPy only).

A bootstrap resample of n cases is a row of n counts: how often each case was drawn. Every figure here can be computed
for R such rows at once from scores that are sorted a single time, which is what makes hundreds of resamples cheap.
A figure that the cases leave undefined (an AUC without positives, say) is NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from r1jax.errors import UserError

Cases = Shaped[np.ndarray, "n"]
"""One number a case; every argument of this type in a call has the same length."""
_CHUNK = 2**20
"""Case counts held at once by `bootstrap` (8 MB)."""


class Estimate(NamedTuple):
    """A figure and its percentile bootstrap interval."""

    value: float
    low: float
    high: float


class OperatingPoint(NamedTuple):
    """What calling `score >= threshold` positive yields on the given cases."""

    threshold: float
    sensitivity: float
    specificity: float


class RocCurve(NamedTuple):
    """Points of the ROC curve, from no case called positive to all of them."""

    false_positive_rate: Float[np.ndarray, "K"]
    sensitivity: Float[np.ndarray, "K"]
    thresholds: Float[np.ndarray, "K"]


class PrecisionRecallCurve(NamedTuple):
    """Points of the precision-recall curve, by ascending recall; precision is 1 where nothing is called positive."""

    recall: Float[np.ndarray, "K"]
    precision: Float[np.ndarray, "K"]
    thresholds: Float[np.ndarray, "K"]


class Reliability(NamedTuple):
    """Mean forecast, share of positives and number of cases of each bin of a calibration diagram."""

    forecast: Float[np.ndarray, "bins"]
    observed: Float[np.ndarray, "bins"]
    count: Int[np.ndarray, "bins"]


@dataclass(frozen=True)
class Ranking:
    """Cases called positive at each threshold, counted for R weightings of the same cases.

    `thresholds` descend from +inf; equal scores share one threshold, so ties count as half in the AUC.
    """

    thresholds: Float[np.ndarray, "K"]
    true_positives: Float[np.ndarray, "R K"]
    false_positives: Float[np.ndarray, "R K"]

    @cached_property
    def sensitivity(self) -> Float[np.ndarray, "R K"]:
        """Share of the positive cases at or above each threshold."""
        return ratio(self.true_positives, self.true_positives[:, -1:])

    @cached_property
    def specificity(self) -> Float[np.ndarray, "R K"]:
        """Share of the negative cases below each threshold."""
        negatives = self.false_positives[:, -1:]
        return ratio(negatives - self.false_positives, negatives)

    def auc(self) -> Float[np.ndarray, "R"]:
        """Area under the ROC curve by the trapezoid rule (Mann-Whitney's U over the number of pairs)."""
        tp, fp = self.true_positives, self.false_positives
        pairs = np.einsum("rk,rk->r", np.diff(fp, axis=1), tp[:, 1:] + tp[:, :-1]) / 2
        return ratio(pairs, tp[:, -1] * fp[:, -1])

    def average_precision(self) -> Float[np.ndarray, "R"]:
        """Precision averaged over the positive cases, without interpolation (as scikit-learn defines it)."""
        tp, fp = self.true_positives, self.false_positives
        precision = ratio(tp[:, 1:], tp[:, 1:] + fp[:, 1:], otherwise=0.0)
        return ratio(np.einsum("rk,rk->r", np.diff(tp, axis=1), precision), tp[:, -1])

    def sensitivity_at(self, specificity: float) -> tuple[Float[np.ndarray, "R"], Int[np.ndarray, "R"]]:
        """Finds the highest sensitivity whose specificity is at least the one asked for.

        Returns:
          That sensitivity, and its index into `thresholds`.
        """
        index = np.maximum((self.specificity >= specificity).sum(axis=1) - 1, 0)
        value = np.take_along_axis(self.true_positives, index[:, None], axis=1)[:, 0]
        defined = self.false_positives[:, -1] > 0
        return np.where(defined, ratio(value, self.true_positives[:, -1]), np.nan), index

    def specificity_at(self, sensitivity: float) -> tuple[Float[np.ndarray, "R"], Int[np.ndarray, "R"]]:
        """Finds the highest specificity whose sensitivity is at least the one asked for.

        Returns:
          That specificity, and its index into `thresholds`.
        """
        index = np.minimum((self.sensitivity < sensitivity).sum(axis=1), len(self.thresholds) - 1)
        value = np.take_along_axis(self.false_positives, index[:, None], axis=1)[:, 0]
        negatives = self.false_positives[:, -1]
        defined = self.true_positives[:, -1] > 0
        return np.where(defined, ratio(negatives - value, negatives), np.nan), index


def rank(labels: Cases, scores: Cases, weights: Float[np.ndarray, "R n"] | None = None) -> Ranking:
    """Sorts the cases by score, highest first, and counts them down to each distinct score.

    Args:
      labels: 1 (or True) for a positive case, 0 for a negative one.
      scores: Higher means more likely positive; any finite numbers.
      weights: Count of each case in each of R resamples; None counts every case once (R = 1).

    Raises:
      UserError: A label is neither 0 nor 1, or a score is not finite.
    """
    labels, scores = checked(labels, scores)
    weights = np.ones((1, len(labels))) if weights is None else weights
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last = np.append(ordered[1:] != ordered[:-1], np.ones(min(len(ordered), 1), bool))
    drawn = weights[:, order]
    called = np.cumsum(drawn, axis=1)[:, last]
    tp = np.cumsum(drawn * labels[order][None], axis=1)[:, last]
    start = np.zeros((len(weights), 1))
    return Ranking(
        np.append(np.inf, ordered[last]),
        np.concatenate([start, tp], axis=1),
        np.concatenate([start, called - tp], axis=1),
    )


def roc_auc(labels: Cases, scores: Cases) -> float:
    """Area under the ROC curve: the chance that a positive case outscores a negative one, ties counting half."""
    return float(rank(labels, scores).auc()[0])


def average_precision(labels: Cases, scores: Cases) -> float:
    """Area under the precision-recall curve as a step function; NaN without positive cases."""
    return float(rank(labels, scores).average_precision()[0])


def roc_curve(labels: Cases, scores: Cases) -> RocCurve:
    """Every point of the ROC curve; thresholds descend from +inf."""
    ranking = rank(labels, scores)
    return RocCurve(1 - ranking.specificity[0], ranking.sensitivity[0], ranking.thresholds)


def precision_recall_curve(labels: Cases, scores: Cases) -> PrecisionRecallCurve:
    """Every point of the precision-recall curve; thresholds descend from +inf."""
    ranking = rank(labels, scores)
    tp, fp = ranking.true_positives[0], ranking.false_positives[0]
    return PrecisionRecallCurve(ranking.sensitivity[0], ratio(tp, tp + fp, otherwise=1.0), ranking.thresholds)


def sensitivity_at_specificity(labels: Cases, scores: Cases, specificity: float) -> OperatingPoint:
    """Highest sensitivity at which at least this specificity is kept (threshold +inf: only with nothing called)."""
    ranking = rank(labels, scores)
    value, index = ranking.sensitivity_at(specificity)
    k = int(index[0])
    return OperatingPoint(float(ranking.thresholds[k]), float(value[0]), float(ranking.specificity[0, k]))


def specificity_at_sensitivity(labels: Cases, scores: Cases, sensitivity: float) -> OperatingPoint:
    """Highest specificity at which at least this sensitivity is kept."""
    ranking = rank(labels, scores)
    value, index = ranking.specificity_at(sensitivity)
    k = int(index[0])
    return OperatingPoint(float(ranking.thresholds[k]), float(ranking.sensitivity[0, k]), float(value[0]))


def operating_point(labels: Cases, scores: Cases, specificity: float) -> OperatingPoint:
    """Chooses a threshold to freeze for other cases: the highest sensitivity that keeps this specificity here.

    The threshold lies midway between the lowest score that it calls positive and the next one below, so that rounding
    on another device turns no case round, and is always finite.

    Returns:
      The threshold, and the sensitivity and specificity that it has on these cases.
    """
    ranking = rank(labels, scores)
    value, index = ranking.sensitivity_at(specificity)
    k, last = int(index[0]), len(ranking.thresholds) - 1
    above, below = ranking.thresholds[k], ranking.thresholds[min(k + 1, last)]
    if last == 0:  # no cases
        threshold = 0.5
    elif k == 0:  # not even the highest score may be called positive
        threshold = float(np.nextafter(np.float32(below), np.float32(np.inf)))
    else:
        threshold = float(above / 2 + below / 2)
    return OperatingPoint(threshold, float(value[0]), float(ranking.specificity[0, k]))


def at_threshold(labels: Cases, scores: Cases, threshold: float) -> OperatingPoint:
    """Sensitivity and specificity of calling `score >= threshold` positive."""
    labels, scores = checked(labels, scores)
    called, weights = scores >= threshold, labels[None].astype(np.float64)
    return OperatingPoint(
        threshold, float(weighted_mean(called, weights)[0]), float(weighted_mean(~called, 1 - weights)[0])
    )


def equal_mass_bins(scores: Cases, bins: int) -> Int[np.ndarray, "n"]:
    """Number of the bin (0 to bins - 1, lowest scores first) of each case; bins hold equally many cases.

    Equal scores share the bin of their middle rank, so that the order of the cases does not matter; bins may then
    differ in size or stay empty.
    """
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    start = np.cumsum(counts) - counts
    return (((2 * start + counts) * bins) // (2 * max(len(scores), 1)))[inverse]


def reliability_curve(labels: Cases, probabilities: Cases, bins: int = 10) -> Reliability:
    """Calibration diagram over equal-mass bins, lowest forecasts first; empty bins are left out."""
    labels, probabilities = checked(labels, probabilities, probability=True)
    member = equal_mass_bins(probabilities, bins)
    count = np.bincount(member, minlength=bins)
    filled = count > 0
    sums = [np.bincount(member, weights=values, minlength=bins)[filled] for values in (probabilities, labels)]
    return Reliability(sums[0] / count[filled], sums[1] / count[filled], count[filled])


def calibration_errors(
    labels: Cases,
    probabilities: Cases,
    weights: Float[np.ndarray, "R n"],
    bins: int = 15,
) -> Float[np.ndarray, "R"]:
    """Expected calibration error of R weightings of the same cases, over the bins of the unweighted ones."""
    labels, probabilities = checked(labels, probabilities, probability=True)
    gaps = np.zeros((len(labels), bins))
    gaps[np.arange(len(labels)), equal_mass_bins(probabilities, bins)] = probabilities - labels
    return ratio(np.abs(weights @ gaps).sum(axis=1), weights.sum(axis=1))


def expected_calibration_error(labels: Cases, probabilities: Cases, bins: int = 15) -> float:
    """Mean distance between forecast and share of positives over equal-mass bins (Nguyen and O'Connor 2015)."""
    return float(calibration_errors(labels, probabilities, np.ones((1, len(labels))), bins)[0])


def brier_score(labels: Cases, probabilities: Cases) -> float:
    """Mean squared difference between forecast and outcome (Brier 1950)."""
    labels, probabilities = checked(labels, probabilities, probability=True)
    return float(weighted_mean(np.square(probabilities - labels))[0])


def quadratic_kappas(truth: Cases, predicted: Cases, weights: Float[np.ndarray, "R n"]) -> Float[np.ndarray, "R"]:
    """Quadratic kappa of R weightings of the same cases.

    With quadratic weights the confusion matrix is not needed: the disagreement is E[(t - p)^2], and what chance
    gives is the same expectation with t and p independent.
    """
    t, p = truth.astype(np.float64), predicted.astype(np.float64)
    mean_t, mean_p = weighted_mean(t, weights), weighted_mean(p, weights)
    chance = weighted_mean(t * t + p * p, weights) - 2 * mean_t * mean_p
    return 1 - ratio(weighted_mean(np.square(t - p), weights), chance)


def quadratic_kappa(truth: Cases, predicted: Cases) -> float:
    """Cohen's kappa with quadratic weights (Cohen 1968); NaN where both always give the same single rating."""
    return float(quadratic_kappas(truth, predicted, np.ones((1, len(truth))))[0])


def mean_absolute_error(truth: Cases, predicted: Cases) -> float:
    """Mean of |predicted - truth|, in their unit."""
    return float(weighted_mean(np.abs(predicted.astype(np.float64) - truth))[0])


def weighted_mean(values: Cases, weights: Float[np.ndarray, "R n"] | None = None) -> Float[np.ndarray, "R"]:
    """Mean of the values under each of R weightings; NaN where no case has weight."""
    weights = np.ones((1, len(values))) if weights is None else weights
    return ratio(weights @ values.astype(np.float64), weights.sum(axis=1))


def weighted_median(values: Cases, weights: Float[np.ndarray, "R n"] | None = None) -> Float[np.ndarray, "R"]:
    """Median of the values under each of R weightings by whole numbers; NaN without cases."""
    weights = np.ones((1, len(values))) if weights is None else weights
    if not len(values):
        return np.full(len(weights), np.nan)
    order = np.argsort(values, kind="stable")
    ordered, below = values[order].astype(np.float64), np.cumsum(weights[:, order], axis=1)
    half = below[:, -1:] / 2
    return (ordered[(below >= half).argmax(axis=1)] + ordered[(below > half).argmax(axis=1)]) / 2


def bootstrap(
    statistics: Callable[[Float[np.ndarray, "R n"]], dict[str, Float[np.ndarray, "R"]]],
    n: int,
    *,
    resamples: int = 1000,
    seed: int = 0,
    groups: Cases | None = None,
    level: float = 0.95,
) -> dict[str, Estimate]:
    """Percentile bootstrap of several figures on the same resamples (Efron 1979).

    Two figures that are compared belong into one call as their difference: both then see the same resamples.

    Args:
      statistics: Figures by name, one value a row of case counts.
      n: Number of cases.
      resamples: Rows drawn.
      seed: The same seed and n (or groups) draw the same resamples.
      groups: Patient or exam of each case; whole groups are drawn, because their cases are not independent.
      level: Coverage of the interval.

    Returns:
      Each figure's value on the cases themselves and its interval, over those resamples in which it is defined.
    """
    unit = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    units = int(unit.max()) + 1 if n else 0
    rng = np.random.default_rng((seed, 0xB007))
    values = statistics(np.ones((1, n)))
    rows: dict[str, list[np.ndarray]] = {name: [] for name in values}
    for start in range(0, resamples if n else 0, max(1, _CHUNK // max(n, 1))):
        count = min(max(1, _CHUNK // n), resamples - start)
        drawn = rng.integers(0, units, size=(count, units)) + np.arange(count)[:, None] * units
        counts = np.bincount(drawn.ravel(), minlength=count * units).reshape(count, units)
        for name, figure in statistics(counts[:, unit].astype(np.float64)).items():
            rows[name].append(figure)
    tail = (1 - level) / 2
    return {name: _interval(float(value[0]), rows[name], tail) for name, value in values.items()}


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (1927); unlike the bootstrap it does not collapse at 0 and 1."""
    if n <= 0:
        return float("nan"), float("nan")
    z = 1.959963984540054
    share, scale = successes / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z / scale * float(np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def checked(labels: Cases, scores: Cases, *, probability: bool = False) -> tuple[Cases, Float[np.ndarray, "n"]]:
    """Labels as booleans and scores as float64, or an error that names the first bad case.

    Raises:
      UserError: A label is neither 0 nor 1, a score is not finite, or (with `probability`) lies outside 0 to 1.
    """
    scores = scores.astype(np.float64)
    _refuse((labels != 0) & (labels != 1), labels, "label", "is neither 0 nor 1: leave out cases without a known label")
    _refuse(~np.isfinite(scores), scores, "score", "is not a finite number: the model's output cannot be evaluated")
    if probability:
        _refuse((scores < 0) | (scores > 1), scores, "probability", "is not between 0 and 1: give probabilities")
    return labels.astype(bool), scores


def ratio(over: np.ndarray, under: np.ndarray, otherwise: float = np.nan) -> np.ndarray:
    """Quotient, and `otherwise` where under is 0; both of shapes that broadcast to one."""
    result = np.full(np.broadcast_shapes(over.shape, under.shape), otherwise)
    return np.divide(over, under, out=result, where=under != 0)


def _refuse(bad: Cases, values: Cases, what: str, why: str) -> None:
    if bad.any():
        first = int(bad.argmax())
        raise UserError(f"{what} {values[first]} of case {first} ({int(bad.sum())} of {len(bad)} such cases) {why}")


def _interval(value: float, chunks: list[np.ndarray], tail: float) -> Estimate:
    drawn = np.concatenate(chunks) if chunks else np.empty(0)
    drawn = drawn[~np.isnan(drawn)]
    if np.isnan(value) or not len(drawn):
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.quantile(drawn, (tail, 1 - tail))
    return Estimate(value, float(low), float(high))
