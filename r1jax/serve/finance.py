"""A period of transactions from a checkpoint to its results: figures, alerts with reasons, a page, and a snapshot."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from r1jax.data.pipeline import original
from r1jax.data.source import Source
from r1jax.data.transaction_cases import TransactionCases
from r1jax.data.transaction_history import FEATURES
from r1jax.data.transaction_simulator import attainable_recall
from r1jax.errors import UserError
from r1jax.serve.evaluate import Evaluation, origin, provenance_lines, report_provenance, shortest, write_metrics
from r1jax.serve.explain import STEPS, TYPICAL, explain
from r1jax.serve.finance_charts import Labelled
from r1jax.serve.finance_page import write_page
from r1jax.serve.progress import progress
from r1jax.serve.risk_reports import to_tree, write_report
from r1jax.serve.scored import Watched, refuse_not_finite
from r1jax.tasks.calibration import from_json
from r1jax.tasks.drift import snapshot
from r1jax.tasks.finance.alerts import ACTIONS, ALERT, BANDS, Policy, make_policy
from r1jax.tasks.finance.batch import EVENT_FEATURES
from r1jax.tasks.finance.evaluation import HEADLINE_RATE, band_counts, evaluate, period_counts
from r1jax.tasks.finance.operating import operating_points, stored_curve
from r1jax.tasks.finance.reasons import Contributions, by_concept, top_reasons, weightiest_span
from r1jax.tasks.finance.report import Alert, Explanation, RiskReport, build_report
from r1jax.tasks.finance.scored import ScoredTransactions
from r1jax.tasks.intervals import figure_text
from r1jax.train.evaluation import Evaluator


class Judged(NamedTuple):
    """A scored period, and what follows for each transaction."""

    cases: TransactionCases
    scored: ScoredTransactions
    scores: dict[str, Float[np.ndarray, "N"]]
    """By mode, before calibration."""
    probability: Float[np.ndarray, "N"]
    policy: Policy
    bands: Int[np.ndarray, "N"]
    warnings: list[str]

    @property
    def alerts(self) -> Int[np.ndarray, "A"]:
        """Transactions that are alerts, in order of time."""
        return np.flatnonzero(self.bands >= ALERT)


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
    return "\n".join(_closing(run, metrics))


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
      UserError: A score is not finite, or nothing sets the thresholds.
    """
    modes = tuple(run.task.modes())
    with progress("transactions", len(source)) as steps:
        found, _, ids = evaluator.predict(
            params, Watched(source, steps), batch_size=run.arguments.batch_size, modes=modes
        )
    for mode, outcome in found.items():
        refuse_not_finite(outcome, ids, mode)
    scores = {mode: outcome["fraud"] for mode, outcome in found.items()}
    cases = original(source)
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
            ceilings = attainable_recall(cases.table, cases.rows, run.task.delay, HEADLINE_RATE)
        figures = evaluate(
            scored,
            judged.scores,
            judged.probability,
            judged.policy,
            settings,
            ceilings=ceilings,
            resamples=run.arguments.resamples,
        )
    chosen = judged.alerts[np.argsort(-scored.score[judged.alerts], kind="stable")][: run.arguments.reasons]
    found = None
    if len(chosen):
        quiet = np.argsort(scored.score, kind="stable")[: len(scored.ids) // 2 + 1]
        typical = quiet[np.linspace(0, len(quiet) - 1, min(TYPICAL, len(quiet))).astype(int)]
        found = explain(run.model, run.task, run.mesh, params, source, chosen, typical)
    metrics = {
        "provenance": origin(run, source, seen),
        "warnings": _warnings(run, judged, seen),
        "counts": period_counts(scored),
        "policy": judged.policy._asdict(),
        "bands": band_counts(judged.bands),
        "alerts": len(judged.alerts),
        "explanations": None if found is None else _completeness(found),
        "figures": figures,
    }
    return metrics, list(_reports(run, judged, metrics, source, chosen, found))


def _seen_in_training(run: Evaluation, cases: TransactionCases) -> int:
    """How many of the transactions the checkpoint was trained on."""
    trained = run.checkpoint.config()
    if run.config.data.path != trained.data.path:
        return 0
    rows = original(run.task.source("train")).rows
    return int(np.isin(cases.rows, rows).sum())


def _warnings(run: Evaluation, judged: Judged, seen: int) -> list[str]:
    """What a reader of the figures must know."""
    told = list(judged.warnings)
    if seen:
        told.append(f"{seen} of these {len(judged.scored.ids)} transactions were learned from: figures are optimistic")
    elif run.config.data.split == "val" and run.config.data.path == run.checkpoint.config().data.path:
        told.append("these transactions chose the checkpoint, thresholds and calibration: the figures are optimistic")
    days = judged.scored.days
    if days < 7:
        told.append(f"the period has only {days} days: intervals that resample days are rough")
    return told


def _completeness(found: Contributions) -> dict[str, Any]:
    """The check that contributions add up to the difference from the baseline."""
    difference, residual = np.abs(found.output - found.baseline), np.abs(found.residual)
    return {
        "method": "integrated gradients",
        "steps": STEPS,
        "explained": len(residual),
        "mean_difference": float(difference.mean()),
        "mean_residual": float(residual.mean()),
        "largest_residual": float(residual.max()),
    }


def _reports(
    run: Evaluation,
    judged: Judged,
    metrics: dict[str, Any],
    source: Source,
    chosen: Int[np.ndarray, "C"],
    found: Contributions | None,
) -> list[RiskReport]:
    cases, scored, provenance = judged.cases, judged.scored, report_provenance(metrics)
    explained = _worded(found, chosen, source) if found is not None else {}
    reports = []
    for index in judged.alerts.tolist():
        reasons, explanation = explained.get(index, ((), None))
        alert = Alert(
            transaction=scored.ids[index],
            seconds=int(scored.seconds[index]),
            customer=cases.table.customers[int(scored.customer[index])].as_py(),
            terminal=cases.table.terminals[int(scored.terminal[index])].as_py(),
            amount=float(scored.amount[index]),
            score=float(scored.score[index]),
            probability=float(judged.probability[index]),
            band=int(judged.bands[index]),
            reasons=reasons,
            explanation=explanation,
        )
        reports.append(
            build_report(
                alert,
                policy=judged.policy,
                provenance=provenance,
                synthetic=run.synthetic,
                language=run.arguments.language,
            )
        )
    return reports


def _worded(
    found: Contributions, chosen: Int[np.ndarray, "C"], source: Source
) -> dict[int, tuple[tuple[tuple[str, float, str], ...], Explanation]]:
    """Reasons and the check that they add up, by transaction."""
    sums, residual = by_concept(found, FEATURES, EVENT_FEATURES), found.residual
    notes = source.read_batch(chosen).get("text", [""] * len(chosen))
    worded = {}
    for place, index in enumerate(chosen.tolist()):
        bytes_alone = found.text[place, 1:]  # the first token marks the beginning
        reasons = tuple(
            (code, gain, weightiest_span(notes[place], bytes_alone) if code == "note" else "")
            for code, gain in top_reasons(sums[place])
        )
        ends = {name: float(getattr(found, name)[place]) for name in ("baseline", "output")}
        worded[index] = reasons, Explanation(**ends, residual=float(residual[place]))
    return worded


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
        judged.scored.days,
    )


def _closing(run: Evaluation, metrics: dict[str, Any]) -> list[str]:
    """The headline figures, and where the files are."""
    figures, counts, output = metrics["figures"], metrics["counts"], shortest(run.output)
    made = metrics["provenance"]
    told = [
        f"{made['data']['name']}: {counts['transactions']} transactions of {counts['days']} days, checkpoint of step "
        f"{made['checkpoint']['step']}",
        "",
    ]
    told += ["no label is known: nothing is measured"] if figures is None else _figure_lines(figures)
    check = metrics["explanations"]
    if check is not None:
        told.append(
            f"reasons of {check['explained']} alerts: contributions add up to a difference of "
            f"{check['mean_difference']:.2f} but for {check['mean_residual']:.3f} on average, "
            f"{check['largest_residual']:.3f} at most"
        )
    return [
        *told,
        "",
        *(f"warning: {line}" for line in metrics["warnings"]),
        f"page      {output / 'index.html'}",
        f"figures   {output / 'metrics.json'}",
        f"alerts    {output / 'alerts.jsonl'} ({metrics['alerts']}; JSON and XML of each in reports/)",
        f"scores    {output / 'scores.parquet'}, {output / 'snapshot.json'} (for r1jax monitor)",
        f"time      {made['seconds']['total']:.0f} s",
    ]


def _figure_lines(figures: dict[str, Any]) -> list[str]:
    rate, lines = f"{HEADLINE_RATE:g}", []
    names = {"both": "all", "transactions": "transactions only", "text": "notes only"}
    for mode, found in figures["modes"].items():
        at = found["at_rate"][rate]
        value, interval = figure_text(at["recall"], "%")
        best = figures["ceilings"].get(mode)
        lines.append(
            f"{names[mode]:<18} recall {value} ({interval}) at a false positive rate of {100 * HEADLINE_RATE:g} %, "
            f"precision {figure_text(at['precision'], '%')[0]}, "
            f"value recall {figure_text(at['value_recall'], '%')[0]}, AUPRC {figure_text(found['auprc'], '1')[0]}"
            + (f"; attainable {100 * best:.1f} %" if best else "")
        )
    operating, accuracy = figures["operating"], figures["accuracy"]
    needed = figures["modes"]["both"]["rate_for_claimed_recall"]
    return [
        *lines,
        f"frozen threshold   {operating['alerts_per_day']:.1f} alerts a day, recall "
        f"{figure_text(operating['recall'], '%')[0]}, false positive rate "
        f"{figure_text(operating['false_positive_rate'], '%')[0]} (set by {operating['origin']})",
        f"accuracy           {100 * accuracy['model']:.2f} %; calling nothing fraud is right for "
        f"{100 * accuracy['nothing_is_fraud']:.2f} %",
        f"a recall of {100 * needed['recall']:.1f} % would need a false positive rate of {figure_text(needed, '%')[0]}",
    ]
