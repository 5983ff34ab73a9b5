"""The table that closes a run: what was learned, beside the best attainable, and where the files are."""

import io

from rich.console import Console
from rich.table import Table

from r1jax.data.source import Source
from r1jax.errors import UserError
from r1jax.train.run import Run

LABELS = {"both": "images + record", "image_only": "images only", "record_only": "record only"}


def closing_table(run: Run, validation: Source) -> str:
    """Renders the validation figures of the best checkpoint.

    Args:
      run: The finished run.
      validation: Cases that were scored; synthetic ones know their ceiling.

    Returns:
      Text of the table and of the paths.
    """
    best, newest = run.checkpoints.best(), run.checkpoints.all()[-1]
    if best is None:
        raise UserError(f"{run.workdir} holds no checkpoint")
    scored = best.meta()["validation"]
    ceilings = validation.ceilings() if hasattr(validation, "ceilings") else {}
    table = Table(title=f"{validation.name}: {scored['cases']} validation cases, step {best.step}")
    for name in ("figure", "shown", "reached", "best attainable"):
        table.add_column(name, justify="right" if name in ("reached", "best attainable") else "left")
    for mode, figures in scored["figures"].items():
        for name, value in figures.items():
            ceiling = ceilings.get(mode) if name == "auc.malignancy" else None
            table.add_row(name, LABELS[mode], f"{value:.3f}", "" if ceiling is None else f"{ceiling:.3f}")
    out = io.StringIO()
    Console(file=out, width=110).print(table)
    return (
        f"{out.getvalue()}best checkpoint  {best.path}\nlast checkpoint  {newest.path}\n"
        f"figures          {run.workdir / 'metrics.jsonl'}, {run.workdir / 'tensorboard'}\n"
        f"next             python eval.py --checkpoint {run.workdir}"
    )
