"""The table that closes a run: what was learned, beside the best attainable, and where the files are."""

import io

from rich.console import Console
from rich.table import Table

from r1jax.data.source import Source
from r1jax.errors import UserError
from r1jax.tasks.medical.evaluation import MODES
from r1jax.train.modes import best_attainable, shown_modes
from r1jax.train.run import Run

FIGURES = {"auc": "AUC", "kappa": "kappa"}
WIDTH = 100


def closing_table(run: Run, validation: Source) -> str:
    """Renders the validation figures of the best checkpoint.

    Args:
      run: The finished run.
      validation: Cases that were scored; synthetic ones know their ceiling.

    Returns:
      Text of the table, at most `WIDTH` wide, and of the paths.

    Raises:
      UserError: The run has no checkpoint.
    """
    best = run.checkpoints.best()
    if best is None:
        raise UserError(f"{run.workdir} holds no checkpoint: train first")
    scored = best.meta()["validation"]
    shown = shown_modes(best.config().model.modalities, validation.modalities)
    lines = []
    if scored and scored["figures"]:
        out = io.StringIO()
        Console(file=out, width=WIDTH).print(_table(scored["figures"], shown, best_attainable(validation)))
        lines.append(f"{validation.name}: {scored['cases']} validation cases, step {best.step}")
        lines.append(out.getvalue().rstrip("\n"))
    lines += [
        f"best checkpoint  {best.path}",
        f"last checkpoint  {run.checkpoints.all()[-1].path}",
        f"figures          {run.workdir / 'metrics.jsonl'}, {run.workdir / 'tensorboard'}",
        f"next             python eval.py --checkpoint {run.workdir}",
    ]
    return "\n".join(lines)


def _table(figures: dict[str, dict[str, float]], shown: dict[str, str], ceilings: dict[str, dict[str, float]]) -> Table:
    """One row a finding, one column for each thing that the model was shown."""
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
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 3) + 0.0:.3f}"  # adding 0 turns a rounded -0.0 into 0.0
