"""Figures of merit during training, and the table that closes a run."""

import numpy as np

from r1jax.tasks.finance.metrics import rank_fraud
from r1jax.tasks.metrics import average_precision, roc_auc
from r1jax.tasks.task import Figures

RATE = 0.003
"""False-positive rate at which recall is counted first: three false alarms in a thousand genuine payments."""
COLUMNS = {"both": "all", "transactions": "transactions only", "text": "notes only"}
"""Titles of what is shown of a payment."""
_RECALL = f"recall_fpr_{100 * RATE:g}"
_NAMES = {_RECALL: f"recall at FPR {100 * RATE:g} %", "auprc": "AUPRC", "auroc": "AUROC"}


def fraud_figures(fraud: np.ndarray, score: np.ndarray) -> dict[str, float]:
    """Recall at `RATE`, areas under both curves.

    Args:
      fraud: 1, 0, or NaN where unknown.
      score: Higher is more suspicious.

    Returns:
      By name; empty without payments of both kinds.
    """
    known = ~np.isnan(fraud)
    if not 0 < fraud[known].sum() < known.sum():
        return {}
    labels, scores = fraud[known], score[known]
    ranking = rank_fraud(labels == 1, scores, np.ones(len(labels)))
    return {
        "auprc": average_precision(labels, scores),
        "auroc": roc_auc(labels, scores),
        _RECALL: float(ranking.at_rate(RATE).recall[0]),
    }


def validation_table(figures: dict[str, Figures], ceilings: dict[str, float], fraud: np.ndarray) -> str:
    """Validation figures of each way to show a payment, beside what is attainable.

    Args:
      figures: By mode, from `fraud_figures`.
      ceilings: Highest recall at `RATE` that anyone could reach, by mode; empty where unknown.
      fraud: Labels of the payments that were judged.

    Returns:
      One line a figure, a column a mode.
    """
    shown = [mode for mode in COLUMNS if figures.get(mode)]
    width = 20
    lines = ["  " + " " * width + "".join(f"{COLUMNS[mode]:>20}" for mode in shown)]
    for name, title in _NAMES.items():
        cells = "".join(f"{figures[mode][name]:>20.3f}" for mode in shown)
        lines.append(f"  {title:<{width}}{cells}")
    if ceilings:
        cells = "".join(f"{ceilings[mode]:>20.3f}" for mode in shown)
        lines.append(f"  {'attainable recall':<{width}}{cells}")
        lines.append("  (generated payments: frauds that leave a trace at all, and the rest by chance)")
    share = float(np.nanmean(fraud))
    lines.append(f"  {int(np.nansum(fraud))} frauds, {share:.2%}; calling none fraud is right for {1 - share:.2%}")
    return "\n".join(lines)
