"""How runs differ, in tables and in curves laid over each other."""

from html import escape
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from r1jax.errors import UserError
from r1jax.serve.run_folder import RunFolder

MADE = (
    "versions",
    "git",
    "dirty",
    "command",
    "device",
    "devices",
    "processes",
    "data",
    "preprocess",
    "environment",
    "host",
)
"""Entries of a start that are compared."""
POINTS = 2000
"""Points kept of a curve: more cannot be seen."""
PANELS = 3
"""Figures of the validation that are drawn beside the loss."""


class Comparison(NamedTuple):
    """What differs between runs, and their figures."""

    runs: list[str]
    config: dict[str, list[Any]]
    """Fields that differ, a value a run; None where a run has no such field."""
    made: dict[str, list[Any]]
    """The same of versions, revision, data, command and surroundings."""
    figures: dict[str, list[Any]]
    """All figures, last and best."""
    problems: list[str]

    def tables(self) -> dict[str, dict[str, list[Any]]]:
        """The tables by their titles."""
        return {"config": self.config, "made with": self.made, "figures": self.figures}


def compare(runs: list[RunFolder]) -> Comparison:
    """Compares runs.

    Args:
      runs: As read.

    Returns:
      JSON-able tables.
    """
    made = [{name: run.made()[name] for name in MADE if name in run.made()} for run in runs]
    return Comparison(
        [str(run.path) for run in runs],
        _differing(_beside([_flat(run.config) for run in runs])),
        _differing(_beside([_flat(one) for one in made])),
        _beside([_figures(run) for run in runs]),
        [line for run in runs for line in run.problems],
    )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _beside(columns: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name) for column in columns] for name in names}


def _differing(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def _figures(run: RunFolder) -> dict[str, Any]:
    """Last and best figures of one run."""
    found = {"step": run.step, "loss": run.latest("loss"), "goodput": run.latest("goodput")}
    for name, at in (("best", run.best), ("last", run.last)):
        if at is not None:
            step, validation = at
            found |= {f"{name}.step": step, f"{name}.score": validation.get("score")}
            modes = validation.get("figures")
            numbers = _flat(modes if isinstance(modes, dict) else {})
            found |= {f"{name}.{k}": v for k, v in numbers.items() if isinstance(v, float | int)}
    return found


def write_picture(path: Path, runs: list[RunFolder], found: Comparison) -> None:
    """Draws loss and validation of all runs over each other, into one file that needs nothing else.

    Args:
      path: .svg, .png, or .html, which has the tables too.
      runs: As read.
      found: Their comparison.

    Raises:
      UserError: The ending is another, or the file cannot be written.
    """
    kind = path.suffix.lower()
    if kind not in (".svg", ".png", ".html"):
        raise UserError(f"--output {path} must end in .svg, .png or .html")
    figure = _draw(runs)
    draft = path.with_name(f".{path.name}.draft")
    try:
        with matplotlib.rc_context({"svg.hashsalt": "r1jax", "svg.fonttype": "none"}):
            if kind == ".html":
                picture = StringIO()
                figure.savefig(picture, format="svg", metadata={"Date": None})
                draft.write_text(_page(picture.getvalue(), found), "utf-8")
            else:
                figure.savefig(draft, format=kind[1:], metadata={"Date": None} if kind == ".svg" else None)
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise UserError(f"--output {path} cannot be written: {error.strerror or error}") from error


def _draw(runs: list[RunFolder]) -> Figure:
    rows = [row for run in runs for row in run.rows]
    names = dict.fromkeys(k for row in rows for k, v in row.items() if k.startswith("validation.") and _number(v))
    shown = ["loss", *list(names)[:PANELS]]
    figure = Figure(figsize=(7, 2.6 * len(shown)), layout="constrained")
    for axes, name in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True):
        for run in runs:
            points = np.array([(row["step"], row[name]) for row in run.rows if _number(row.get(name))], float)
            if len(points):
                kept = points[np.unique(np.linspace(0, len(points) - 1, POINTS).astype(int))]
                # A name that starts with _ would be left out of the legend, and $ would be taken for mathematics.
                label = " " + str(run.path).replace("$", r"\$")
                axes.plot(*kept.T, lw=1, marker="." if len(kept) < 50 else None, label=label)
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    return figure


def _number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def _page(picture: str, found: Comparison) -> str:
    """Picture and tables as one page."""
    parts = [picture[picture.index("<svg") :]]
    for title, rows in found.tables().items():
        lines = ["".join(f"<th>{escape(str(name))}</th>" for name in ("", *found.runs))]
        for name, values in rows.items():
            lines.append("".join(f"<td>{escape('-' if x is None else str(x))}</td>" for x in (name, *values)))
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        parts.append(f"<h2>{title}</h2>" + (f"<table>{body}</table>" if rows else "<p>no difference</p>"))
    style = "body{font:14px sans-serif;margin:2em}td,th{padding:.2em 1em;text-align:left;border-bottom:1px solid #ccc}"
    head = f'<meta charset="utf-8"><title>runs</title><style>{style}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>'
