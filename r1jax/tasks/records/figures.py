"""How well classes were told apart: accuracy and macro F1; for two classes also areas, KS, Brier score and ECE."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from r1jax.tasks import metrics as m

UNITS = {"accuracy": "share", "macro_f1": "F1", "cross_entropy": "nats", "auroc": "AUC", "auprc": "average precision"}
UNITS |= {"ks": "largest TPR - FPR", "brier": "mean square", "ece": "mean distance over 15 bins"}
"""What each figure is."""

Statistics = Callable[[Float[np.ndarray, "R n"]], dict[str, Float[np.ndarray, "R"]]]


def statistics(label: Int[np.ndarray, " n"], probability: Float[np.ndarray, "n C"]) -> Statistics:
    """Figures of R weightings of the same cases.

    Args:
      label: Class of each case, all known.
      probability: Of each class.

    Returns:
      A function of the weights, for `bootstrap`.
    """
    classes = probability.shape[1]
    called = probability.argmax(axis=1)
    right = (called == label).astype(np.float64)
    own = probability[np.arange(len(label)), label].astype(np.float64)
    surprise = -np.log(np.maximum(own, np.finfo(np.float32).tiny))

    def figures(weights: Float[np.ndarray, "R n"]) -> dict[str, Float[np.ndarray, "R"]]:
        found = {
            "accuracy": m.weighted_mean(right, weights),
            "macro_f1": _macro_f1(label, called, classes, weights),
            "cross_entropy": m.weighted_mean(surprise, weights),
        }
        if classes == 2:
            found |= _two_classes(label == 1, probability[:, 1].astype(np.float64), weights)
        return found

    return figures


def _macro_f1(
    label: Int[np.ndarray, " n"], called: Int[np.ndarray, " n"], classes: int, weights: Float[np.ndarray, "R n"]
) -> Float[np.ndarray, "R"]:
    """Mean F1 of the classes that occur or are called; as scikit-learn's, 0 for one that is never right."""
    scores = []
    for k in range(classes):
        actual, said = weights @ (label == k), weights @ (called == k)
        scores.append(m.ratio(2 * (weights @ ((label == k) & (called == k))), actual + said))
    present = ~np.isnan(np.stack(scores))
    return m.ratio(np.nansum(np.stack(scores), axis=0), present.sum(axis=0).astype(np.float64))


def _two_classes(
    label: np.ndarray, score: Float[np.ndarray, " n"], weights: Float[np.ndarray, "R n"]
) -> dict[str, Float[np.ndarray, "R"]]:
    ranking = m.rank(label, score, weights)
    positives, negatives = ranking.true_positives[:, -1:], ranking.false_positives[:, -1:]
    gaps = m.ratio(ranking.true_positives, positives) - m.ratio(ranking.false_positives, negatives)
    return {
        "auroc": ranking.auc(),
        "auprc": ranking.average_precision(),
        "ks": gaps.max(axis=1),
        "brier": m.weighted_mean(np.square(score - label), weights),
        "ece": m.calibration_errors(label, score, weights),
    }


def record_figures(label: Int[np.ndarray, " n"], probability: Float[np.ndarray, "n C"]) -> dict[str, float]:
    """The same of the cases as they are.

    Args:
      label: Class of each case, below 0 where nobody knows it.
      probability: Of each class.

    Returns:
      By name; those that the cases leave undefined are left out.
    """
    known = label >= 0
    if not known.any():
        return {}
    found = statistics(label[known], probability[known])(np.ones((1, int(known.sum()))))
    return {name: float(value[0]) for name, value in found.items() if np.isfinite(value[0])}
