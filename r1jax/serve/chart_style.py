"""How every chart of a page looks: SVG in colours that are CSS variables of the page, which follow light or dark."""

import re
from html import escape
from io import StringIO

import matplotlib
import numpy as np
from jaxtyping import Float, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Matplotlib needs literal colours; these stand for the page's variables and are replaced in the finished SVG.
VARIABLES = {
    name: f"#0a0b{number:02x}"
    for number, name in enumerate(
        ("ink", "muted", "line", "panel", "both", "image-only", "record-only", "positive", "negative"), start=16
    )
}
INK, MUTED, LINE, PANEL = (VARIABLES[name] for name in ("ink", "muted", "line", "panel"))
HUE = {
    "both": "both",
    "image_only": "image-only",
    "record_only": "record-only",
    "transactions": "image-only",
    "text": "record-only",
}
"""The page's variable for each mode of each task."""
COLOR = {mode: VARIABLES[hue] for mode, hue in HUE.items()}
_DASHES = {"both": "-", "image-only": (0, (5, 1.5)), "record-only": (0, (1.5, 1.2))}
DASHES = {mode: _DASHES[hue] for mode, hue in HUE.items()}
"""Line styles differ too, for readers and printers that see no colours."""
MARKER = {mode: {"both": "o", "image-only": "s", "record-only": "D"}[hue] for mode, hue in HUE.items()}
POINTS = 400
"""Points kept of a curve: more cannot be seen."""
STYLE = {
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


def blank(height: float) -> Figure:
    """An empty figure of the page's width, so many inches high."""
    return Figure(figsize=(5, height), layout="constrained")


def plot(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    figure = blank(4.0)
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.tick_params(length=0)
    return figure, axes


def unit_square(axes: Axes) -> None:
    """Limits both axes to 0 to 1, with room for the lines at the ends."""
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))


def draw_curve(axes: Axes, mode: str, x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"], **style: object) -> None:
    """Draws the line of a mode."""
    axes.plot(x, y, color=COLOR[mode], ls=DASHES[mode], lw=2.2 if mode == "both" else 1.7, **style)


def dot(mode: str) -> dict[str, object]:
    """Style of a single point of a mode."""
    return {"marker": MARKER[mode], "ms": 6, "color": COLOR[mode], "mec": PANEL, "mew": 1.2, "ls": "none", "zorder": 5}


def thin(n: int) -> Shaped[np.ndarray, "k"]:
    """Indices of at most `POINTS` of n points, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, min(n, POINTS)).round().astype(int))


def svg(figure: Figure, title: str) -> str:
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
    for name, literal in VARIABLES.items():
        text = text.replace(literal, f"var(--{name})")
    return re.sub(r"\s*\n\s*", "\n", text)
