"""What closes a run: the task's table of what was learned, what it took, and where the files are."""

import json

from r1jax.data.source import Source
from r1jax.errors import UserError
from r1jax.tasks.task import Task
from r1jax.train.run import Run


def closing_table(run: Run, task: Task, validation: Source) -> str:
    """Renders the validation figures of the best checkpoint.

    Args:
      run: The finished run.
      task: Renders its figures.
      validation: Cases that were scored; synthetic ones know their ceiling.

    Returns:
      Text of the table and of the paths.

    Raises:
      UserError: The run has no checkpoint.
    """
    best = run.checkpoints.best()
    if best is None:
        raise UserError(f"{run.workdir} holds no checkpoint: train first")
    scored = best.meta()["validation"]
    lines = []
    if scored and scored["figures"]:
        lines.append(f"{validation.name}: {scored['cases']} validation {task.unit}, step {best.step}")
        cases = best.step * best.config().train.batch_size
        lines.append(task.closing(scored["figures"], validation, cases))
    lines += _cost(run)
    lines += [
        f"best checkpoint  {best.path}",
        f"last checkpoint  {run.checkpoints.all()[-1].path}",
        f"figures          {run.workdir / 'metrics.jsonl'}, {run.workdir / 'tensorboard'}",
        f"next             python eval.py --checkpoint {run.workdir}",
    ]
    return "\n".join(lines)


def _cost(run: Run) -> list[str]:
    """Goodput over all processes of the run, and the highest of their memory peaks; none where nothing was logged."""
    file = run.workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    measured = [row for row in rows if "goodput" in row]
    if not measured:
        return []
    minutes = run.clock.seconds / 60
    lines = [f"goodput          {run.clock.goodput:.1%} of {minutes:,.1f} min went into steps that were kept"]
    for what in ("host", "device"):
        peaks = [row[name] for row in measured if (name := f"{what}_memory_peak_bytes") in row]
        if peaks:
            lines.append(f"{f'{what} memory':<17}{max(peaks) / 2**20:,.0f} MiB at most")
    return lines
