"""A period of transactions from a checkpoint to its results: figures, alerts with reasons, a page, and a snapshot."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from r1jax.data.pipeline import original
from r1jax.data.source import Source
from r1jax.data.transaction_cases import TransactionCases
from r1jax.data.transaction_history import FEATURES
from r1jax.data.transaction_simulator import attainable_recall
from r1jax.errors import UserError
from r1jax.serve.evaluate import Evaluation, origin, provenance_lines, same_path, write_metrics
from r1jax.serve.finance_alerts import alert_reports, completeness, explain_alerts
from r1jax.serve.finance_charts import Labelled
from r1jax.serve.finance_closing import closing_lines
from r1jax.serve.finance_judged import Judged
from r1jax.serve.finance_page import write_page
from r1jax.serve.progress import progress
from r1jax.serve.risk_reports import to_tree, write_report
from r1jax.serve.scored import Watched, refuse_not_finite
from r1jax.tasks.calibration import from_json
from r1jax.tasks.drift import snapshot
from r1jax.tasks.finance.alerts import ACTIONS, BANDS, make_policy
from r1jax.tasks.finance.evaluation import band_counts, evaluate, labelled_days, period_counts
from r1jax.tasks.finance.figures import RATE
from r1jax.tasks.finance.operating import operating_points, stored_curve
from r1jax.tasks.finance.report import RiskReport
from r1jax.tasks.finance.scored import ScoredTransactions
from r1jax.train.evaluation import Evaluator


def score_transactions(run: Evaluation, evaluator: Evaluator, params: Any, source: Source, folder: Path) -> str:
    """Scores every transaction and writes all results.

    Args:
      run: What is evaluated.
      evaluator: Compiled forward pass.
      params: Weights to serve.
      source: The transactions.
      folder: Where to; it must exist.

    Returns:
      Text to print.

    Raises:
      UserError: A score is not finite, or nothing sets the thresholds.
    """
    judged = judge(run, evaluator, params, source)
    metrics, reports = _measure(run, judged, params, source)
    (folder / "reports").mkdir()
    with (folder / "alerts.jsonl").open("w", encoding="utf-8") as lines:
        for report in reports:
            write_report(folder / "reports", report)
            lines.write(json.dumps(to_tree(report), ensure_ascii=False, allow_nan=False) + "\n")
    _write_scores(judged, folder)
    write_page(
        folder / "index.html",
        title=f"{run.config.name}: {source.name}",
        metrics=metrics,
        labelled=_labelled(judged),
        reports=sorted(reports, key=lambda report: -report.score),
        provenance=provenance_lines(metrics),
        synthetic=run.synthetic,
    )
    write_metrics(run, metrics, folder)
    return "\n".join(closing_lines(run, metrics))


def judge(run: Evaluation, evaluator: Evaluator, params: Any, source: Source) -> Judged:
    """Scores, calibrates and bands every transaction.

    Args:
      run: What is evaluated.
      evaluator: Compiled forward pass.
      params: Weights to serve.
      source: The transactions.

    Returns:
      What follows for each.

    Raises:
      UserError: A score is not finite, nothing sets the thresholds, or genuine transactions were left out.
    """
    cases = original(source)
    if cases.kept < 1:
        raise UserError(
            f"data.split train holds only {cases.kept:.0%} of the genuine transactions, so that no figure would be "
            "that of the period: score --data.split val, test or all"
        )
    modes = tuple(run.task.modes())
    with progress("transactions", len(source)) as steps:
        found, _, ids = evaluator.predict(
            params, Watched(source, steps), batch_size=run.arguments.batch_size, modes=modes
        )
    for mode, outcome in found.items():
        refuse_not_finite(outcome, ids, mode)
    scores = {mode: outcome["fraud"] for mode, outcome in found.items()}
    rows, table = cases.rows, cases.table
    scored = ScoredTransactions(
        ids=ids,
        seconds=table.seconds[rows],
        amount=table.amount[rows],
        customer=table.customer[rows].astype(np.int64),
        terminal=table.terminal[rows].astype(np.int64),
        fraud=table.fraud[rows],
        scenario=None if table.scenario is None else table.scenario[rows].astype(np.int64),
        score=scores[modes[0]],
    )
    stored, warnings = _stored(run, scored)
    policy = make_policy(stored_curve(stored["curve"]), run.config.task.finance.alerts)
    probability = from_json(stored["calibration"])(scored.score)
    return Judged(cases, scored, scores, probability, policy, policy.bands(scored.score, probability), warnings)


def _stored(run: Evaluation, scored: ScoredTransactions) -> tuple[dict[str, Any], list[str]]:
    """What validation has set; where there was none, the same set on these transactions, and a warning."""
    stored = (run.checkpoint.meta()["validation"] or {}).get("operating_points", {}).get("both")
    if stored:
        return stored, []
    kind = run.config.task.finance.alerts.calibration
    here = operating_points(scored.fraud, scored.score, scored.days, kind)
    if not here:
        raise UserError(
            f"{run.checkpoint.path} has no thresholds, as no validation had both fraud and genuine transactions, and "
            "these transactions cannot set them either: score a period with labels of both kinds"
        )
    return here, ["the checkpoint has no thresholds: they and the calibration were set on these transactions"]


def _measure(run: Evaluation, judged: Judged, params: Any, source: Source) -> tuple[dict[str, Any], list[RiskReport]]:
    """Everything that metrics.json holds, and the reports of the alerts in order of time."""
    cases, scored, settings = judged.cases, judged.scored, run.config.task.finance.alerts
    seen = _seen_in_training(run, cases)
    figures = None
    if scored.labelled.any():
        ceilings = None
        if cases.table.shown is not None:
            ceilings = attainable_recall(cases.table, cases.rows, run.task.delay, RATE)
        figures = evaluate(
            scored,
            judged.scores,
            judged.probability,
            judged.policy,
            settings,
            ceilings=ceilings,
            resamples=run.arguments.resamples,
        )
    chosen = judged.most_suspicious(run.arguments.reasons)
    found = explain_alerts(run, judged, params, source, chosen) if len(chosen) else None
    metrics = {
        "provenance": origin(run, source, seen),
        "warnings": _warnings(run, judged, seen),
        "counts": period_counts(scored),
        "label_delay_days": run.config.task.finance.label_delay_days,
        "policy": judged.policy._asdict(),
        "bands": band_counts(judged.bands),
        "alerts": len(judged.alerts),
        "explanations": None if found is None else completeness(found),
        "figures": figures,
    }
    return metrics, alert_reports(run, judged, metrics, source, chosen, found)


def _seen_in_training(run: Evaluation, cases: TransactionCases) -> int:
    """How many of the transactions the checkpoint was trained on."""
    if not same_path(run.config.data.path, run.checkpoint.config().data.path):
        return 0
    rows = original(run.task.source("train")).rows
    return int(np.isin(cases.rows, rows).sum())


def _warnings(run: Evaluation, judged: Judged, seen: int) -> list[str]:
    """What a reader of the figures must know."""
    told = [*judged.warnings, *run.task.note_warnings(judged.cases)]
    if seen:
        told.append(f"{seen} of these {len(judged.scored.ids)} transactions were learned from: figures are optimistic")
    elif run.config.data.split == "val" and same_path(run.config.data.path, run.checkpoint.config().data.path):
        told.append("these transactions chose the checkpoint, thresholds and calibration: the figures are optimistic")
    scored = judged.scored
    frauds, labelled = int((scored.fraud == 1).sum()), int(scored.labelled.sum())
    if labelled and not 0 < frauds < labelled:
        told.append(f"{frauds} of {labelled} known labels are fraud: rates and areas need both kinds and are undefined")
    if 0 < labelled < len(scored.ids):
        told.append(
            f"{labelled} of {len(scored.ids)} labels are known: alerts a day are those of all transactions, costs a "
            "day are scaled up as if the known ones were a random part, the rest is measured on those alone"
        )
    share, days = len(judged.alerts) / len(judged.scored.ids), judged.scored.days
    if share > 0.1:
        told.append(f"{share:.0%} of these transactions are alerts: lower --alerts-per-day to what can be looked at")
    if days < 7:
        told.append(f"the period has only {days} days: intervals that resample days are rough")
    return told


def _write_scores(judged: Judged, folder: Path) -> None:
    """Writes every score with the features of the transaction, and the snapshot that later periods are held against."""
    scored, table = judged.scored, judged.cases.table
    features = judged.cases.history.features[judged.cases.rows]
    columns = {name: features[:, i] for i, name in enumerate(FEATURES)} | {"score": scored.score}
    labels = pa.array(scored.fraud, mask=np.isnan(scored.fraud))
    pq.write_table(
        pa.table(
            {
                "id": scored.ids,
                "time": pa.array(scored.seconds, pa.timestamp("s", "UTC")),
                "customer": table.customers.take(pa.array(scored.customer)),
                "terminal": table.terminals.take(pa.array(scored.terminal)),
                "fraud": labels,
                **{f"score.{mode}": score for mode, score in judged.scores.items()},
                "probability": judged.probability,
                "band": pa.array(np.array(BANDS)[judged.bands]),
                "action": pa.array(np.array(ACTIONS)[judged.bands]),
                **{f"feature.{name}": column for name, column in columns.items()},
            }
        ),
        folder / "scores.parquet",
    )
    kept = {
        "period": period_counts(scored),
        "threshold": judged.policy.review,
        "alert_share": len(judged.alerts) / len(scored.ids),
        "columns": snapshot(columns),
    }
    (folder / "snapshot.json").write_text(json.dumps(kept, allow_nan=False) + "\n", "utf-8")


def _labelled(judged: Judged) -> Labelled | None:
    known = judged.scored.labelled
    if not known.any():
        return None
    scored = judged.scored.part(known)
    return Labelled(
        scored.fraud == 1,
        scored.amount.astype(np.float64),
        {mode: score[known].astype(np.float64) for mode, score in judged.scores.items()},
        labelled_days(judged.scored),
    )
