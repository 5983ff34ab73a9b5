"""Chest-CT cases from a checkpoint to their results: metrics.json, one HTML page and a structured report of each."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from r1jax.data.pipeline import original
from r1jax.data.source import Source
from r1jax.serve.case_reports import Reporter, write_report
from r1jax.serve.evaluate import (
    Evaluation,
    origin,
    provenance_lines,
    report_provenance,
    shortest,
    write_metrics,
)
from r1jax.serve.gallery import gallery
from r1jax.serve.page import write_page
from r1jax.serve.page_charts import Scores
from r1jax.serve.progress import progress
from r1jax.serve.saliency import explained_finding, saliency_maps
from r1jax.serve.scored import Scored, score, seen_in_training
from r1jax.tasks.medical.evaluation import evaluate_modalities
from r1jax.tasks.medical.modes import best_attainable
from r1jax.tasks.medical.schema import FINDING
from r1jax.tasks.medical.summary import summary_lines
from r1jax.train.evaluation import Evaluator
from r1jax.train.run import trained_fingerprints


def score_cases(run: Evaluation, evaluator: Evaluator, params: Any, source: Source, folder: Path) -> str:
    """Scores every case and writes all results.

    Args:
      run: What is evaluated.
      evaluator: Compiled forward pass.
      params: Weights to serve.
      source: The cases.
      folder: Where to; it must exist.

    Returns:
      Text to print.

    Raises:
      UserError: A prediction is not finite, or a case cannot be reported; names the case.
    """
    validation = run.checkpoint.meta()["validation"]
    scored = score(evaluator, run.task, params, source, validation, run.arguments.batch_size)
    metrics = measure(run, scored)
    write_results(run, scored, metrics, params, folder)
    return closing_lines(run, metrics)


def measure(run: Evaluation, scored: Scored) -> dict[str, Any]:
    """Every figure of every finding and mode, and where all of it comes from.

    Args:
      run: What is evaluated.
      scored: Predictions.

    Returns:
      What `evaluate_modalities` gives, after "provenance" and "warnings"; JSON as it stands.
    """
    made, source = run.checkpoint.meta(), scored.source
    thresholds = {
        mode: {name: point.threshold for name, point in points.items()} for mode, points in scored.frozen.items()
    }
    figures = evaluate_modalities(
        scored.predicted,
        scored.targets,
        operating_points=thresholds,
        ceilings=best_attainable(source),
        groups=scored.groups,
        resamples=run.arguments.resamples,
    )
    seen = seen_in_training(source, run.task, trained_fingerprints(made))
    return {"provenance": origin(run, source, seen), "warnings": _warnings(run, scored, seen), **figures}


def write_results(run: Evaluation, scored: Scored, metrics: dict[str, Any], params: Any, folder: Path) -> None:
    """Writes the reports, the page and, last, metrics.json.

    Args:
      run: What is evaluated.
      scored: Predictions.
      metrics: From `measure`.
      params: Weights, for the saliency.
      folder: Where to; it must exist.

    Raises:
      UserError: A case cannot be reported; names it.
    """
    reporter = _reporter(run, scored, metrics)
    (folder / "reports").mkdir()
    with progress("reports", len(scored.ids)) as steps:
        for report in reporter.reports():
            write_report(folder / "reports", report)
            steps.advance()
    explained = explained_finding(run.task.fields)
    maps = functools.partial(saliency_maps, run.model, run.task, run.mesh, params, scored.source)
    write_page(
        folder / "index.html",
        title=f"{run.config.name}: {scored.source.name}",
        metrics=metrics,
        curves=_curves(scored),
        pictures=gallery(reporter, run.arguments.pictures, explained, maps),
        provenance=provenance_lines(metrics),
        synthetic=run.synthetic,
    )
    write_metrics(run, metrics, folder)


def _reporter(run: Evaluation, scored: Scored, metrics: dict[str, Any]) -> Reporter:
    return Reporter(
        scored=scored,
        provenance=report_provenance(metrics),
        synthetic=run.synthetic,
        language=run.arguments.language,
    )


def _curves(scored: Scored) -> list[Scores]:
    """Labels and probabilities of each binary finding and mode whose truth is known in some case."""
    curves = []
    for mode, predicted in scored.predicted.items():
        for name, probabilities in predicted.items():
            if FINDING[name].kind != "binary":
                continue
            known = ~np.isnan(scored.targets[name])
            if known.any():
                labels = scored.targets[name][known]
                curves.append(Scores(name, mode, labels, probabilities[known], scored.threshold(mode, name)))
    return curves


def _warnings(run: Evaluation, scored: Scored, seen: int) -> list[str]:
    """What a reader of the figures must know."""
    data, source = run.config.data, original(scored.source)
    made = run.checkpoint.meta()["data"]
    chosen_by = made.get("mixed", [made["fingerprint"]])[0]
    found = []
    if seen:
        found.append(
            f"{seen} of these {len(source)} cases were seen in training: the figures do not say how the model does on "
            "new cases"
        )
    elif data.split == "val" and (run.synthetic or source.fingerprint == chosen_by):
        found.append("these cases chose the checkpoint and its operating points: the figures are somewhat optimistic")
    unset = {name for mode in scored.points for name in scored.points[mode] if name not in scored.frozen[mode]}
    if unset:
        found.append(
            f"the checkpoint has no operating point of {', '.join(sorted(unset))}: it was set on the cases of this "
            "evaluation"
        )
    return found


def closing_lines(run: Evaluation, metrics: dict[str, Any]) -> str:
    """The headline figures, and where the files are.

    Args:
      run: What was evaluated.
      metrics: From `measure`.

    Returns:
      Text to print.
    """
    made, output = metrics["provenance"], shortest(run.output)
    return "\n".join(
        [
            f"{made['data']['name']}: {made['data']['cases']} cases, checkpoint of step {made['checkpoint']['step']}",
            "",
            *summary_lines(metrics),
            "",
            *(f"warning: {line}" for line in metrics["warnings"]),
            f"page     {output / 'index.html'}",
            f"figures  {output / 'metrics.json'}",
            f"reports  {output / 'reports'} ({made['data']['cases']} cases, JSON and XML)",
            f"time     {made['seconds']['total']:.0f} s",
        ]
    )
