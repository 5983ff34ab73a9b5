"""Figures of a checkpoint on records, with intervals, as metrics.json, and every probability as scores.parquet."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from r1jax.data.pipeline import original
from r1jax.data.records import UNKNOWN, RecordCases
from r1jax.data.source import Source
from r1jax.errors import UserError
from r1jax.serve.evaluate import Evaluation, origin, write_metrics
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
    known = label != UNKNOWN
    seen, warnings = seen_in_training(run, cases)
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
        "warnings": [*warnings, *_unlabelled(known), *task.text_warnings(cases)],
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


def seen_in_training(run: Evaluation, cases: RecordCases) -> tuple[int | None, list[str]]:
    """How many of the records the checkpoint was trained on.

    The records of training are looked for where they were, and in what is scored, which may be a copy; their
    fingerprint tells. In another file, a record is the one of the same stock and day, or else one of which the same is
    read.

    Args:
      run: What is evaluated.
      cases: The records.

    Returns:
      Their number, and what a reader of the figures must know; None where the records of training are unknown.
    """
    scored, trained, made = run.config.data, run.checkpoint.config().data, run.checkpoint.meta()["data"]
    parts = {path: _training_part(run, path) for path in dict.fromkeys((scored.path, trained.path))}
    same = {path: part for path, part in parts.items() if part and part.fingerprint == made["fingerprint"]}
    if not same:
        told = f"the records of training ({made['name']}) are not here as they were: whether they are scored is unknown"
        return None, [told]
    (where, learned), here = next(iter(same.items())), scored.path in same
    if here:
        seen, where = int(np.isin(cases.rows, learned.rows).sum()), ""
    else:
        known, where = set(learned.identities()), f", as {where} has them too"
        seen = sum(one in known for one in cases.identities())
    if seen:
        return seen, [f"{seen} of these {len(cases)} records were learned from{where}: figures are optimistic"]
    if here and scored.split == "val":
        return 0, ["these records chose the checkpoint: the figures are somewhat optimistic"]
    return 0, []


def _training_part(run: Evaluation, path: str | None) -> RecordCases | None:
    """The training part of a file before any preprocessing; None where it has none or is gone."""
    data = replace(run.config.data, path=path, preprocess="")
    try:
        found = RecordsTask(replace(run.config, data=data)).source("train")
    except UserError:
        return None
    assert isinstance(found, RecordCases)
    return found


def _unlabelled(known: np.ndarray) -> list[str]:
    """How many of the records can be judged, if not all."""
    if known.all():
        return []
    return [f"{int(known.sum())} of {len(known)} records have a known class: the rest is scored, not measured"]


def _closing(run: Evaluation, metrics: dict[str, Any]) -> list[str]:
    """Every figure of every mode, a line each."""
    lines = [f"{metrics['provenance']['data']['name']}: {metrics['counts']}, 95 % intervals"]
    for mode, figures in metrics["figures"].items():
        for name, figure in figures.items():
            value, interval = figure_text(figure, "1")
            lines.append(f"  {mode:<8}{name:<14}{value} ({interval})  {UNITS[name]}")
    lines += [f"warning: {line}" for line in metrics["warnings"]]
    return [*lines, f"figures  {run.output / 'metrics.json'}", f"scores   {run.output / 'scores.parquet'}"]
