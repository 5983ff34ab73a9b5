"""Charts of a scored period of transactions."""

from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.ticker import FuncFormatter

from r1jax.serve.chart_style import (
    COLOR,
    INK,
    MARKER,
    MUTED,
    STYLE,
    VARIABLES,
    draw_curve,
    plot,
    svg,
    thin,
    unit_square,
)
from r1jax.tasks.finance.figures import RATE
from r1jax.tasks.finance.metrics import cost_curve, rank_fraud
from r1jax.tasks.metrics import precision_recall_curve, roc_curve


class Labelled(NamedTuple):
    """Transactions with a known label, and what each mode says of them."""

    fraud: Bool[np.ndarray, "n"]
    amount: Float[np.ndarray, "n"]
    scores: dict[str, Float[np.ndarray, "n"]]
    days: float
    """That costs and alerts spread over (`labelled_days`)."""


@matplotlib.rc_context(STYLE)
def precision_recall_chart(data: Labelled) -> str:
    """Precision against recall, one line a mode."""
    figure, axes = plot("recall: share of frauds called", "precision: share of frauds among those called")
    axes.plot([0, 1], [data.fraud.mean()] * 2, color=MUTED, lw=0.8, ls=":")
    for mode, score in data.scores.items():
        curve = precision_recall_curve(data.fraud, score)
        keep = thin(len(curve.thresholds))
        draw_curve(axes, mode, curve.recall[keep], curve.precision[keep], drawstyle="steps-pre")
    unit_square(axes)
    return svg(figure, "Precision and recall")


@matplotlib.rc_context(STYLE)
def rate_chart(data: Labelled) -> str:
    """Recall against the false positive rate, whose axis is logarithmic: only its left end can be afforded."""
    figure, axes = plot("false positive rate", "recall")
    least = 1e-4
    for mode, score in data.scores.items():
        curve = roc_curve(data.fraud, score)
        rates = np.geomspace(least, 1, 300)
        index = np.searchsorted(curve.false_positive_rate, rates + 1e-12, side="right") - 1
        draw_curve(axes, mode, rates, curve.sensitivity[index], drawstyle="steps-post")
    axes.axvline(RATE, color=INK, lw=1, ls=(0, (4, 2)))
    axes.set(xscale="log", xlim=(least, 1), ylim=(-0.01, 1.02))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g} %"))
    axes.minorticks_off()
    return svg(figure, "Recall by false positive rate")


@matplotlib.rc_context(STYLE)
def cost_chart(data: Labelled, review_cost: float, alerts_per_day: float) -> str:
    """Cost of a day against the alerts of a day, of all modes; the dashed line is the frozen threshold."""
    figure, axes = plot("alerts a day", "cost a day: fraud let pass, and reviews")
    for mode, score in data.scores.items():
        curve = cost_curve(rank_fraud(data.fraud, score, data.amount), review_cost, data.days)
        inside = np.flatnonzero(curve.alerts_per_day >= 1 / data.days)
        keep = inside[np.unique(np.geomspace(1, len(inside), 300).astype(int)) - 1]
        draw_curve(axes, mode, curve.alerts_per_day[keep], curve.cost_per_day[keep])
    axes.axvline(max(alerts_per_day, 1 / data.days), color=INK, lw=1, ls=(0, (4, 2)))
    axes.set(xscale="log", ylim=(0, None))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.minorticks_off()
    return svg(figure, "Cost by number of alerts")


@matplotlib.rc_context(STYLE)
def reliability_chart(bins: dict[str, list[float]]) -> str:
    """Share of frauds against forecast in bins of equally many transactions, on logarithmic axes."""
    figure, axes = plot("forecast probability", "share of frauds")
    forecast, observed = (np.maximum(np.array(bins[name]), 1e-5) for name in ("forecast", "observed"))
    axes.plot([1e-5, 1], [1e-5, 1], color=MUTED, lw=0.8, ls=":")
    draw_curve(axes, "both", forecast, observed, marker=MARKER["both"], ms=3.5)
    axes.set(xscale="log", yscale="log", xlim=(0.8e-5, 1.2), ylim=(0.8e-5, 1.2))
    axes.minorticks_off()
    return svg(figure, "Calibration")


@matplotlib.rc_context(STYLE)
def weeks_chart(weeks: list[dict[str, Any]], expected: float) -> str:
    """False positive rate of the frozen threshold week after week, with intervals; dotted: that on validation."""
    figure, axes = plot("week of the period", "false positive rate, %")
    axes.axhline(100 * expected, color=MUTED, lw=0.8, ls=":")
    known = [week for week in weeks if week["false_positive_rate"]["value"] is not None]
    for week in known:
        rate = week["false_positive_rate"]
        axes.plot([week["week"]] * 2, [100 * rate["low"], 100 * rate["high"]], color=COLOR["both"], lw=2.2, alpha=0.55)
    values = [100 * week["false_positive_rate"]["value"] for week in known]
    numbers = np.array([float(week["week"]) for week in known])
    draw_curve(axes, "both", numbers, np.array(values), marker=MARKER["both"], ms=5)
    axes.set_xticks([week["week"] for week in known])
    axes.set(ylim=(0, None))
    return svg(figure, "False positive rate by week")


@matplotlib.rc_context(STYLE)
def score_chart(data: Labelled, threshold: float) -> str:
    """How often each score is given to frauds and to genuine transactions; the scale is that of log-odds."""
    figure, axes = plot("score", "share of the class")
    edges = np.linspace(-10, 6, 41)
    log_odds = lambda p: np.clip(np.log(np.clip(p, 1e-12, 1)) - np.log1p(-np.clip(p, 0, 1 - 1e-12)), -10, 6)  # noqa: E731
    score = log_odds(data.scores["both"].astype(np.float64))
    for members, color, hatch in ((~data.fraud, "negative", ""), (data.fraud, "positive", "////")):
        weights = np.full(int(members.sum()), 1 / max(int(members.sum()), 1))
        style = {"color": VARIABLES[color], "weights": weights}
        axes.hist(score[members], edges, alpha=0.3, hatch=hatch, lw=0, **style)
        axes.hist(score[members], edges, histtype="step", lw=1.4, **style)
    axes.axvline(float(log_odds(np.array(threshold))), color=INK, lw=1, ls=(0, (4, 2)))
    ticks = np.array([1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99])
    axes.set_xticks(log_odds(ticks), [f"{100 * tick:g} %" for tick in ticks])
    return svg(figure, "Scores")
