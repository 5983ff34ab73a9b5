"""What closes a run: the task's table of what was learned, and where the files are."""

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
        lines.append(task.closing(scored["figures"], validation, best.step))
    lines += [
        f"best checkpoint  {best.path}",
        f"last checkpoint  {run.checkpoints.all()[-1].path}",
        f"figures          {run.workdir / 'metrics.jsonl'}, {run.workdir / 'tensorboard'}",
        f"next             python eval.py --checkpoint {run.workdir}",
    ]
    return "\n".join(lines)
