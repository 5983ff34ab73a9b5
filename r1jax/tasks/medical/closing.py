"""Validation figures of the findings, beside the best attainable, as a run's closing table shows them."""

import io

from rich.console import Console
from rich.table import Table

from r1jax.tasks.medical.evaluation import MODES
from r1jax.tasks.task import Figures

FIGURES = {"auc": "AUC", "kappa": "kappa"}
WIDTH = 100


def findings_table(figures: dict[str, Figures], shown: dict[str, str], ceilings: dict[str, dict[str, float]]) -> str:
    """Renders one row a finding, one column for each thing that the model was shown.

    Args:
      figures: By mode, then by `auc.<finding>` and `kappa.<finding>`.
      shown: Modes to show, with the names under which they are reported.
      ceilings: Best attainable AUC by reported mode and finding; empty where unknown.

    Returns:
      Text, at most `WIDTH` wide.
    """
    table = Table()
    table.add_column("finding")
    for mode in shown.values():
        table.add_column(MODES[mode], justify="right")
    if ceilings:
        table.add_column("best attainable", justify="right")
    for name in dict.fromkeys(name for mode in shown for name in figures.get(mode, {})):
        kind, finding = name.split(".", 1)
        cells = [_number(figures.get(mode, {}).get(name)) for mode in shown]
        if ceilings:
            known = [ceilings.get(mode, {}).get(finding) for mode in shown.values()] if kind == "auc" else []
            cells.append(" / ".join(map(_number, known)) if any(known) else "")  # in the order of the columns
        table.add_row(f"{finding.replace('_', ' ')}: {FIGURES[kind]}", *cells)
    out = io.StringIO()
    Console(file=out, width=WIDTH).print(table)
    return out.getvalue().rstrip("\n")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 3) + 0.0:.3f}"  # adding 0 turns a rounded -0.0 into 0.0
