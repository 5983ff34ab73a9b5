"""The figures of one finding and their intervals, as JSON."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from r1jax.errors import UserError
from r1jax.tasks import metrics as m
from r1jax.tasks.intervals import Draw, finite
from r1jax.tasks.medical.schema import Finding

SPECIFICITIES = (0.9, 0.95, 0.973, 0.99)
SENSITIVITIES = (0.9, 0.95, 0.99)
OPERATING_SPECIFICITY = 0.95
"""Specificity that a threshold is set for."""
ECE_BINS = 15
TEXTURE_CLASS = np.array([0, 0, 1, 1, 2])
"""Class of texture ratings 1 to 5: non-solid, part-solid, solid."""


def measure(
    finding: Finding,
    truth: Float[np.ndarray, "n ..."],
    predicted: Float[np.ndarray, "n ..."],
    draw: Draw,
    operating_points: dict[str, float],
    ceilings: dict[str, float],
) -> dict[str, Any]:
    """Measures one finding on the cases whose target is known.

    Args:
      finding: What is reported.
      truth: Targets, without NaN.
      predicted: Predictions of the same cases, all finite.
      draw: How intervals are drawn.
      operating_points: Frozen thresholds of binary findings, where there are any.
      ceilings: Best attainable AUC of binary findings, where it is known.

    Returns:
      Figures as {"value", "low", "high"} and counts, as JSON.
    """
    if finding.kind == "binary":
        threshold, ceiling = operating_points.get(finding.name), ceilings.get(finding.name)
        return _binary(finding.name, truth, predicted, draw, threshold, ceiling)
    if finding.kind == "rating":
        return _rating(finding, truth, predicted, draw)
    return (_length if finding.kind == "length" else _vector)(truth, predicted, draw)


def _binary(
    name: str,
    labels: Float[np.ndarray, "n"],
    scores: Float[np.ndarray, "n"],
    draw: Draw,
    threshold: float | None,
    ceiling: float | None,
) -> dict[str, Any]:
    try:
        positive, scores = m.checked(labels, scores, probability=True)
    except UserError as error:
        raise UserError(f"finding {name!r}: {error}") from None
    origin = "set on validation"
    if threshold is None:
        threshold = m.operating_point(positive, scores, OPERATING_SPECIFICITY).threshold
        origin = f"set on this split (specificity {OPERATING_SPECIFICITY:g})"
    figures = _binary_figures(positive, scores, scores >= threshold, draw)
    levels = {"sensitivity_at_specificity": SPECIFICITIES, "specificity_at_sensitivity": SENSITIVITIES}
    return {
        "positives": int(positive.sum()),
        "prevalence": float(positive.mean()),
        "auc": figures["auc"],
        **_ceiling(figures["auc"], ceiling),
        "average_precision": figures["average_precision"],
        "operating_point": {
            "threshold": float(threshold),
            "origin": origin,
            "unit": "case",
            "sensitivity": figures["sensitivity"],
            "specificity": figures["specificity"],
            "counts": _confusion(positive, scores >= threshold),
        },
        **{key: {f"{level:g}": figures[f"{key} {level:g}"] for level in levels[key]} for key in levels},
        "ece": figures["ece"] | {"bins": ECE_BINS},
        "brier": figures["brier"],
    }


def _binary_figures(
    positive: Bool[np.ndarray, "n"], scores: Float[np.ndarray, "n"], called: Bool[np.ndarray, "n"], draw: Draw
) -> dict[str, dict[str, float | None]]:
    """Figures of a binary finding by name, with the threshold that this split itself would need for a fixed level."""

    def statistics(weights: Float[np.ndarray, "R n"]) -> dict[str, Float[np.ndarray, "R"]]:
        ranking = m.rank(positive, scores, weights)
        return {
            "auc": ranking.auc(),
            "average_precision": ranking.average_precision(),
            **{f"sensitivity_at_specificity {x:g}": ranking.sensitivity_at(x)[0] for x in SPECIFICITIES},
            **{f"specificity_at_sensitivity {x:g}": ranking.specificity_at(x)[0] for x in SENSITIVITIES},
            "sensitivity": m.weighted_mean(called, weights * positive[None]),
            "specificity": m.weighted_mean(~called, weights * ~positive[None]),
            "ece": m.calibration_errors(positive, scores, weights, ECE_BINS),
            "brier": m.weighted_mean(np.square(scores - positive), weights),
        }

    figures = draw.figures(statistics, len(scores))
    for key in figures:
        if key.startswith(("sensitivity", "specificity")):
            _widen(figures[key], draw.units(positive if key.startswith("sensitivity") else ~positive))
    ranking = m.rank(positive, scores)
    for x in SPECIFICITIES:
        threshold = ranking.thresholds[ranking.sensitivity_at(x)[1][0]]
        figures[f"sensitivity_at_specificity {x:g}"]["threshold"] = finite(threshold)
    for x in SENSITIVITIES:
        threshold = ranking.thresholds[ranking.specificity_at(x)[1][0]]
        figures[f"specificity_at_sensitivity {x:g}"]["threshold"] = finite(threshold)
    return figures


def _confusion(positive: Bool[np.ndarray, "n"], called: Bool[np.ndarray, "n"]) -> dict[str, int]:
    return {
        "true_positive": int((positive & called).sum()),
        "false_negative": int((positive & ~called).sum()),
        "false_positive": int((~positive & called).sum()),
        "true_negative": int((~positive & ~called).sum()),
    }


def _rating(
    finding: Finding, truth: Float[np.ndarray, "n"], predicted: Float[np.ndarray, "n levels"], draw: Draw
) -> dict[str, Any]:
    """Accuracy of the likeliest level; the rest of the median level, which is what minimises absolute error."""
    levels = len(finding.levels)
    if ((truth < 1) | (truth > levels)).any():
        raise UserError(
            f"finding {finding.name!r}: targets reach from {truth.min():g} to {truth.max():g}, not 1..{levels}"
        )
    if (predicted < 0).any() or (np.abs(predicted.sum(axis=1) - 1) > 1e-3).any():
        raise UserError(f"finding {finding.name!r}: predictions are no probabilities of its {levels} levels")
    level = np.floor(truth + 0.5)  # readers' means lie between levels
    likeliest = predicted.argmax(axis=1) + 1
    median = (np.cumsum(predicted, axis=1) >= 0.5 - 1e-9).argmax(axis=1) + 1

    def statistics(weights: Float[np.ndarray, "R n"]) -> dict[str, Float[np.ndarray, "R"]]:
        return {
            "accuracy": m.weighted_mean(likeliest == level, weights),
            "within_one": m.weighted_mean(np.abs(median - level) <= 1, weights),
            "mae": m.weighted_mean(np.abs(median - truth), weights),
            "quadratic_kappa": m.quadratic_kappas(level, median, weights),
        }

    figures = draw.figures(statistics, len(truth))
    units = draw.units(np.ones(len(truth), bool))
    _widen(figures["accuracy"], units)
    _widen(figures["within_one"], units)
    result = {"majority_share": _majority(level), **figures}
    if finding.name == "texture":
        summed = np.stack([predicted[:, k == TEXTURE_CLASS].sum(axis=1) for k in range(3)], axis=1)
        group = TEXTURE_CLASS[level.astype(int) - 1]
        hit = summed.argmax(axis=1) == group
        accuracy = draw.figures(lambda weights: {"accuracy": m.weighted_mean(hit, weights)}, len(truth))
        _widen(accuracy["accuracy"], units)
        result["three_class"] = {"majority_share": _majority(group), **accuracy}
    return result


def _length(truth: Float[np.ndarray, "n"], predicted: Float[np.ndarray, "n"], draw: Draw) -> dict[str, Any]:
    if (truth <= 0).any():
        raise UserError(f"a target length is {truth.min():g} mm: lengths are positive, NaN where there is none")
    error = predicted - truth

    def statistics(weights: Float[np.ndarray, "R n"]) -> dict[str, Float[np.ndarray, "R"]]:
        return {
            "mae_mm": m.weighted_mean(np.abs(error), weights),
            "bias_mm": m.weighted_mean(error, weights),
            "relative_error": m.weighted_mean(np.abs(error) / truth, weights),
        }

    return draw.figures(statistics, len(truth))


def _vector(truth: Float[np.ndarray, "n 3"], predicted: Float[np.ndarray, "n 3"], draw: Draw) -> dict[str, Any]:
    distance = np.linalg.norm(predicted - truth, axis=1)

    def statistics(weights: Float[np.ndarray, "R n"]) -> dict[str, Float[np.ndarray, "R"]]:
        return {
            "mean_error": m.weighted_mean(distance, weights),
            "median_error": m.weighted_median(distance, weights),
        }

    return draw.figures(statistics, len(truth))


def _ceiling(auc: dict[str, float | None], ceiling: float | None) -> dict[str, Any]:
    """Best attainable AUC and the share of the way to it from chance, where it is known."""
    if ceiling is None:
        return {}
    way = ceiling - 0.5
    share = {key: None if value is None or way <= 0 else (value - 0.5) / way for key, value in auc.items()}
    return {"ceiling": ceiling, "share_of_ceiling": share}


def _majority(values: Shaped[np.ndarray, "n"]) -> float:
    """Share of the commonest value: what always giving it would score as accuracy."""
    return float(np.unique(values, return_counts=True)[1].max() / len(values))


def _widen(figure: dict[str, Any], n: int) -> None:
    """Gives a proportion of exactly 0 or 1 Wilson's interval, where resampling can only repeat the same answer."""
    if figure["value"] in (0.0, 1.0) and n:
        low, high = m.wilson_interval(figure["value"] * n, n)
        figure["low"], figure["high"] = min(figure["low"], low), max(figure["high"], high)
