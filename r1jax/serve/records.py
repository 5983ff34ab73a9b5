"""Figures of a checkpoint on records, with intervals, as metrics.json, and every probability as scores.parquet."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from r1jax.data.pipeline import original
from r1jax.data.records import UNKNOWN, RecordCases
from r1jax.data.source import Source
from r1jax.serve.evaluate import Evaluation, origin, same_path, write_metrics
from r1jax.serve.progress import progress
from r1jax.serve.scored import Watched, refuse_not_finite
from r1jax.tasks.intervals import Draw, figure_text
from r1jax.tasks.records.figures import UNITS, statistics
from r1jax.tasks.records.task import RecordsTask
from r1jax.train.evaluation import Evaluator


def score_records(run: Evaluation, evaluator: Evaluator, params: Any, source: Source, folder: Path) -> str:
    """Scores every record in every mode and writes metrics.json and scores.parquet.

    Args:
      run: What is evaluated.
      evaluator: Compiled forward pass.
      params: Weights to serve.
      source: The records.
      folder: Where to; it must exist.

    Returns:
      Text to print.

    Raises:
      UserError: A probability is not finite.
    """
    task, cases = run.task, original(source)
    assert isinstance(task, RecordsTask) and isinstance(cases, RecordCases)
    modes = tuple(task.modes())
    with progress("records", len(source)) as steps:
        found, targets, ids = evaluator.predict(
            params, Watched(source, steps), batch_size=run.arguments.batch_size, modes=modes
        )
    for mode, outcome in found.items():
        refuse_not_finite(outcome, ids, mode)
    label, classes = targets["class"], task.kind.classes
    _write_scores(folder / "scores.parquet", ids, label, classes, {mode: x["class"] for mode, x in found.items()})
    known, seen = label != UNKNOWN, _seen_in_training(run, cases)
    days = cases.records.day
    # Stocks of one day fall together, so that whole days are drawn; other records are independent.
    draw = Draw(run.arguments.resamples, 0, None if days is None else days[cases.rows][known])
    figures = {}
    if known.any():
        for mode, outcome in found.items():
            figures[mode] = draw.figures(statistics(label[known], outcome["class"][known]), int(known.sum()))
    counts = {name: int((label == k).sum()) for k, name in enumerate(classes)}
    metrics = {
        "provenance": origin(run, source, seen),
        "warnings": [*_warnings(run, known, seen), *task.text_warnings(cases)],
        "counts": counts | {"unknown": int((~known).sum())},
        "largest_class": max(counts.values()) / int(known.sum()) if known.any() else None,
        "figures": figures,
    }
    write_metrics(run, metrics, folder)
    return "\n".join(_closing(run, metrics))


def _write_scores(
    path: Path, ids: list[str], label: np.ndarray, classes: tuple[str, ...], probability: dict[str, np.ndarray]
) -> None:
    """Writes a row a record: its name, class, and the probability of each class in each mode."""
    named = pa.array(np.array(classes)[np.maximum(label, 0)], mask=label == UNKNOWN)
    columns = {f"{mode}.{name}": p[:, k] for mode, p in probability.items() for k, name in enumerate(classes)}
    pq.write_table(pa.table({"id": ids, "class": named, **columns}), path)


def _seen_in_training(run: Evaluation, cases: RecordCases) -> int:
    """How many of the records the checkpoint was trained on."""
    if not same_path(run.config.data.path, run.checkpoint.config().data.path):
        return 0
    return int(np.isin(cases.rows, original(run.task.source("train")).rows).sum())


def _warnings(run: Evaluation, known: np.ndarray, seen: int) -> list[str]:
    """What a reader of the figures must know."""
    told = []
    if seen:
        told.append(f"{seen} of these {len(known)} records were learned from: figures are optimistic")
    elif run.config.data.split == "val" and same_path(run.config.data.path, run.checkpoint.config().data.path):
        told.append("these records chose the checkpoint: the figures are somewhat optimistic")
    if not known.all():
        told.append(f"{int(known.sum())} of {len(known)} records have a known class: the rest is scored, not measured")
    return told


def _closing(run: Evaluation, metrics: dict[str, Any]) -> list[str]:
    """Every figure of every mode, a line each."""
    lines = [f"{metrics['provenance']['data']['name']}: {metrics['counts']}, 95 % intervals"]
    for mode, figures in metrics["figures"].items():
        for name, figure in figures.items():
            value, interval = figure_text(figure, "1")
            lines.append(f"  {mode:<8}{name:<14}{value} ({interval})  {UNITS[name]}")
    lines += [f"warning: {line}" for line in metrics["warnings"]]
    return [*lines, f"figures  {run.output / 'metrics.json'}", f"scores   {run.output / 'scores.parquet'}"]
