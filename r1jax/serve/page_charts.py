"""Charts of an evaluation as SVG whose colours are the page's CSS variables, so that they follow its light or dark."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO

import matplotlib
import numpy as np
from jaxtyping import Float, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from r1jax.tasks.metrics import Estimate, precision_recall_curve, reliability_curve, roc_curve

# Matplotlib needs literal colours; these stand for the page's variables and are replaced in the finished SVG.
_VARIABLES = {
    name: f"#0a0b{number:02x}"
    for number, name in enumerate(
        ("ink", "muted", "line", "panel", "both", "image-only", "record-only", "positive", "negative"), start=16
    )
}
INK, MUTED, LINE, PANEL = (_VARIABLES[name] for name in ("ink", "muted", "line", "panel"))
COLOR = {mode: _VARIABLES[mode.replace("_", "-")] for mode in ("both", "image_only", "record_only")}
DASHES = {"both": "-", "image_only": (0, (5, 1.5)), "record_only": (0, (1.5, 1.2))}
"""Line styles differ too, for readers and printers that see no colours."""
MARKER = {"both": "o", "image_only": "s", "record_only": "D"}
_POINTS = 400
"""Points kept of a curve: more cannot be seen."""
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Scores:
    """Labels (0 or 1) and probabilities of one binary finding in one mode; cases with unknown label are left out."""

    finding: str
    mode: str
    labels: Shaped[np.ndarray, "n"]
    scores: Float[np.ndarray, "n"]
    threshold: float | None = None
    """Operating point, drawn where it is known."""


@matplotlib.rc_context(_STYLE)
def roc_chart(curves: Sequence[Scores]) -> str:
    """Sensitivity against the false positive rate, one line a mode, with its operating point."""
    figure, axes = _figure("false positive rate (1 - specificity)", "sensitivity")
    axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=":")
    for curve in curves:
        points = roc_curve(curve.labels, curve.scores)
        keep = _thin(len(points.thresholds))
        _curve(axes, curve.mode, points.false_positive_rate[keep], points.sensitivity[keep])
        if curve.threshold is not None:
            called = curve.scores >= curve.threshold
            at = [called[curve.labels == label].mean() for label in (0, 1)]
            axes.plot(*at, **_dot(curve.mode))
    _unit_square(axes)
    return _svg(figure, f"ROC curve, {curves[0].finding}")


@matplotlib.rc_context(_STYLE)
def precision_recall_chart(curves: Sequence[Scores]) -> str:
    """Precision against recall as the step function whose area is the average precision, one line a mode."""
    figure, axes = _figure("recall (sensitivity)", "precision (positive predictive value)")
    prevalence = float(np.mean(curves[0].labels))
    axes.plot([0, 1], [prevalence, prevalence], color=MUTED, lw=0.8, ls=":")
    for curve in curves:
        points = precision_recall_curve(curve.labels, curve.scores)
        keep = _thin(len(points.thresholds))
        _curve(axes, curve.mode, points.recall[keep], points.precision[keep], drawstyle="steps-pre")
    _unit_square(axes)
    return _svg(figure, f"Precision-recall curve, {curves[0].finding}")


@matplotlib.rc_context(_STYLE)
def calibration_chart(curves: Sequence[Scores], bins: int = 10) -> str:
    """Share of positives against forecast in bins of equal mass, and how often each forecast is made."""
    figure = _blank(4.4)
    axes, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (4, 1), "hspace": 0.1})
    axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=":")
    for curve in curves:
        points = reliability_curve(curve.labels, curve.scores, bins)
        _curve(axes, curve.mode, points.forecast, points.observed, marker=MARKER[curve.mode], ms=3.5)
    axes.set(ylabel="share of positives", ylim=(-0.02, 1.02))
    below.hist(curves[0].scores, bins=np.linspace(0, 1, 26), color=COLOR[curves[0].mode], alpha=0.75)
    below.set(xlabel="forecast probability", ylabel="cases", xlim=(-0.01, 1.01))
    below.locator_params(axis="y", nbins=2)
    for part in (axes, below):
        part.tick_params(length=0)
    return _svg(figure, f"Calibration diagram, {curves[0].finding}")


@matplotlib.rc_context(_STYLE)
def score_chart(curve: Scores) -> str:
    """How often each probability is given to positive and to negative cases, with the threshold between them."""
    figure, axes = _figure("forecast probability", "share of the class")
    edges = np.linspace(0, 1, 26)
    for label, color, hatch in ((0, "negative", ""), (1, "positive", "////")):
        scores = curve.scores[curve.labels == label]
        weights = np.full(len(scores), 1 / max(len(scores), 1))
        style = {"color": _VARIABLES[color], "weights": weights}
        axes.hist(scores, edges, alpha=0.3, hatch=hatch, lw=0, **style)
        axes.hist(scores, edges, histtype="step", lw=1.4, **style)
    if curve.threshold is not None:
        axes.axvline(curve.threshold, color=INK, lw=1, ls=(0, (4, 2)))
    axes.set(xlim=(-0.01, 1.01))
    return _svg(figure, f"Probabilities, {curve.finding}")


@matplotlib.rc_context(_STYLE)
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
    figure = _blank(0.75 + (0.8 if len(rows) < 4 else 0.42) * len(rows))
    axes = figure.subplots()
    for at, (_, figures, ceilings) in enumerate(rows):
        shifts = np.linspace(-0.22, 0.22, len(figures)) if len(figures) > 1 else [0.0]
        for shift, (mode, value) in zip(shifts, figures.items(), strict=True):
            axes.plot([value.low, value.high], [at + shift] * 2, color=COLOR[mode], lw=2.2, alpha=0.55)
            axes.plot(value.value, at + shift, **_dot(mode))
            low = min(low, value.low)
            if mode in ceilings:
                axes.plot([ceilings[mode]] * 2, [at + shift - 0.1, at + shift + 0.1], color=INK, lw=1.8)
    axes.set(xlabel=label, xlim=(low - 0.01, 1.005), ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.tick_params(length=0)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    return _svg(figure, title)


def _blank(height: float) -> Figure:
    return Figure(figsize=(5, height), layout="constrained")


def _figure(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = _blank(4.0)
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.tick_params(length=0)
    return figure, axes


def _unit_square(axes: Axes) -> None:
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))


def _curve(axes: Axes, mode: str, x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"], **style: object) -> None:
    axes.plot(x, y, color=COLOR[mode], ls=DASHES[mode], lw=2.2 if mode == "both" else 1.7, **style)


def _dot(mode: str) -> dict[str, object]:
    return {"marker": MARKER[mode], "ms": 6, "color": COLOR[mode], "mec": PANEL, "mew": 1.2, "ls": "none", "zorder": 5}


def _thin(n: int) -> Shaped[np.ndarray, "k"]:
    return np.unique(np.linspace(0, n - 1, min(n, _POINTS)).round().astype(int))


def _svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element to be put into HTML: scalable, in the page's fonts and colours, ids of its own."""
    out = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", text, flags=re.DOTALL
    )
    text = re.sub(
        r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" aria-label="{escape(title)}">', text, count=1
    )
    text = re.sub(r" id=\"[\w.]+_\d+\"|font-family: [^;\"]*; ?", "", text)  # ids that nothing refers to
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"\d+\.\d{3,}", lambda x: f"{float(x[0]):.2f}", tag[0]), text)
    text = text.replace("xlink:href", "href")
    for name, literal in _VARIABLES.items():
        text = text.replace(literal, f"var(--{name})")
    return re.sub(r"\s*\n\s*", "\n", text)
