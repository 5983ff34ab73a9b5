"""Charts of an evaluation of findings, one line a mode."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from jaxtyping import Float, Shaped

from r1jax.serve.chart_style import (
    COLOR,
    INK,
    MARKER,
    MUTED,
    STYLE,
    VARIABLES,
    blank,
    dot,
    draw_curve,
    plot,
    svg,
    thin,
    unit_square,
)
from r1jax.tasks.metrics import Estimate, precision_recall_curve, reliability_curve, roc_curve


@dataclass(frozen=True)
class Scores:
    """Labels (0 or 1) and probabilities of one binary finding in one mode; cases with unknown label are left out."""

    finding: str
    mode: str
    labels: Shaped[np.ndarray, "n"]
    scores: Float[np.ndarray, "n"]
    threshold: float | None = None
    """Operating point, drawn where it is known."""


@matplotlib.rc_context(STYLE)
def roc_chart(curves: Sequence[Scores]) -> str:
    """Sensitivity against the false positive rate, one line a mode, with its operating point."""
    figure, axes = plot("false positive rate (1 - specificity)", "sensitivity")
    axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=":")
    for curve in curves:
        points = roc_curve(curve.labels, curve.scores)
        keep = thin(len(points.thresholds))
        draw_curve(axes, curve.mode, points.false_positive_rate[keep], points.sensitivity[keep])
        if curve.threshold is not None:
            called = curve.scores >= curve.threshold
            at = [called[curve.labels == label].mean() for label in (0, 1)]
            axes.plot(*at, **dot(curve.mode))
    unit_square(axes)
    return svg(figure, f"ROC curve, {curves[0].finding}")


@matplotlib.rc_context(STYLE)
def precision_recall_chart(curves: Sequence[Scores]) -> str:
    """Precision against recall as the step function whose area is the average precision, one line a mode."""
    figure, axes = plot("recall (sensitivity)", "precision (positive predictive value)")
    prevalence = float(np.mean(curves[0].labels))
    axes.plot([0, 1], [prevalence, prevalence], color=MUTED, lw=0.8, ls=":")
    for curve in curves:
        points = precision_recall_curve(curve.labels, curve.scores)
        keep = thin(len(points.thresholds))
        draw_curve(axes, curve.mode, points.recall[keep], points.precision[keep], drawstyle="steps-pre")
    unit_square(axes)
    return svg(figure, f"Precision-recall curve, {curves[0].finding}")


@matplotlib.rc_context(STYLE)
def calibration_chart(curves: Sequence[Scores], bins: int = 10) -> str:
    """Share of positives against forecast in bins of equal mass, and how often each forecast is made."""
    figure = blank(4.4)
    axes, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (4, 1), "hspace": 0.1})
    axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=":")
    for curve in curves:
        points = reliability_curve(curve.labels, curve.scores, bins)
        draw_curve(axes, curve.mode, points.forecast, points.observed, marker=MARKER[curve.mode], ms=3.5)
    axes.set(ylabel="share of positives", ylim=(-0.02, 1.02))
    below.hist(curves[0].scores, bins=np.linspace(0, 1, 26), color=COLOR[curves[0].mode], alpha=0.75)
    below.set(xlabel="forecast probability", ylabel="cases", xlim=(-0.01, 1.01))
    below.locator_params(axis="y", nbins=2)
    for part in (axes, below):
        part.tick_params(length=0)
    return svg(figure, f"Calibration diagram, {curves[0].finding}")


@matplotlib.rc_context(STYLE)
def score_chart(curve: Scores) -> str:
    """How often each probability is given to positive and to negative cases, with the threshold between them."""
    figure, axes = plot("forecast probability", "share of the class")
    edges = np.linspace(0, 1, 26)
    for label, color, hatch in ((0, "negative", ""), (1, "positive", "////")):
        scores = curve.scores[curve.labels == label]
        weights = np.full(len(scores), 1 / max(len(scores), 1))
        style = {"color": VARIABLES[color], "weights": weights}
        axes.hist(scores, edges, alpha=0.3, hatch=hatch, lw=0, **style)
        axes.hist(scores, edges, histtype="step", lw=1.4, **style)
    if curve.threshold is not None:
        axes.axvline(curve.threshold, color=INK, lw=1, ls=(0, (4, 2)))
    axes.set(xlim=(-0.01, 1.01))
    return svg(figure, f"Probabilities, {curve.finding}")


@matplotlib.rc_context(STYLE)
def forest_chart(
    rows: Sequence[tuple[str, dict[str, Estimate], dict[str, float]]], label: str, *, low: float, title: str
) -> str:
    """Figures with intervals as dots and whiskers, one row a finding and one dot a mode.

    Args:
      rows: Name, figure by mode, and by mode the best attainable value where it is known.
      label: Axis label.
      low: Left end of the axis; it moves left where an interval needs it.
      title: What the chart is called for those who cannot see it.
    """
    figure = blank(0.75 + (0.8 if len(rows) < 4 else 0.42) * len(rows))
    axes = figure.subplots()
    for at, (_, figures, ceilings) in enumerate(rows):
        shifts = np.linspace(-0.22, 0.22, len(figures)) if len(figures) > 1 else [0.0]
        for shift, (mode, value) in zip(shifts, figures.items(), strict=True):
            axes.plot([value.low, value.high], [at + shift] * 2, color=COLOR[mode], lw=2.2, alpha=0.55)
            axes.plot(value.value, at + shift, **dot(mode))
            low = min(low, value.low)
            if mode in ceilings:
                axes.plot([ceilings[mode]] * 2, [at + shift - 0.1, at + shift + 0.1], color=INK, lw=1.8)
    axes.set(xlabel=label, xlim=(low - 0.01, 1.005), ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.tick_params(length=0)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    return svg(figure, title)
