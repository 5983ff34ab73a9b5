"""Alerts with their reasons, worded as reports."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from r1jax.data.source import Source
from r1jax.data.transaction_history import FEATURES
from r1jax.serve.evaluate import Evaluation, report_provenance
from r1jax.serve.explain import STEPS, TYPICAL, explain
from r1jax.serve.finance_judged import Judged
from r1jax.tasks.finance.batch import EVENT_FEATURES
from r1jax.tasks.finance.reasons import TOLERANCE, Contributions, by_concept, top_reasons, weightiest_span
from r1jax.tasks.finance.report import Alert, Explanation, RiskReport, build_report


def explain_alerts(
    run: Evaluation, judged: Judged, params: Any, source: Source, chosen: Int[np.ndarray, "C"]
) -> Contributions:
    """What each input adds to the scores of chosen transactions, against typical ones of the same period.

    Args:
      run: What is evaluated.
      judged: Its transactions.
      params: Weights to serve.
      source: The transactions.
      chosen: Which to explain; at least one.

    Returns:
      Contributions, in the order of `chosen`.
    """
    return explain(run.model, run.task, run.mesh, params, source, chosen, judged.typical(TYPICAL))


def completeness(found: Contributions) -> dict[str, Any]:
    """The check that contributions add up to the difference from the baseline."""
    difference, residual = np.abs(found.output - found.baseline), np.abs(found.residual)
    return {
        "method": "integrated gradients",
        "steps": STEPS,
        "explained": len(residual),
        "complete": int(found.complete.sum()),
        "tolerance": TOLERANCE,
        "mean_difference": float(difference.mean()),
        "mean_residual": float(residual.mean()),
        "largest_residual": float(residual.max()),
    }


def alert_reports(
    run: Evaluation,
    judged: Judged,
    metrics: dict[str, Any],
    source: Source,
    chosen: Int[np.ndarray, "C"],
    found: Contributions | None,
) -> list[RiskReport]:
    """The report of every alert.

    Args:
      run: What is evaluated.
      judged: Its transactions.
      metrics: With their "provenance".
      source: The transactions.
      chosen: Those that were explained.
      found: What was found; None where nothing was.

    Returns:
      In order of time; without reasons where they were not asked for.
    """
    cases, scored, provenance = judged.cases, judged.scored, report_provenance(metrics)
    explained = {}
    if found is not None:
        notes = source.read_batch(chosen).get("text", [""] * len(chosen))
        explained = dict(zip(chosen.tolist(), worded(found, notes), strict=True))
    reports = []
    for index in judged.alerts.tolist():
        reasons, explanation = explained.get(index, ((), None))
        alert = Alert(
            transaction=scored.ids[index],
            seconds=int(scored.seconds[index]),
            customer=cases.table.customers[int(scored.customer[index])].as_py(),
            terminal=cases.table.terminals[int(scored.terminal[index])].as_py(),
            # str() gives the shortest digits that are still the same number in float32.
            amount=float(str(scored.amount[index])),
            score=float(str(scored.score[index])),
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


def worded(found: Contributions, notes: Sequence[str]) -> list[tuple[tuple[tuple[str, float, str], ...], Explanation]]:
    """Words what was found.

    Args:
      found: Contributions of C transactions.
      notes: Of the same.

    Returns:
      Of each, its reasons as `Alert` takes them and the check that they add up.
    """
    sums, residual = by_concept(found, FEATURES, EVENT_FEATURES), found.residual
    told = []
    for place, note in enumerate(notes):
        bytes_alone = found.text[place, 1:]  # the first token marks the beginning
        top = top_reasons(sums[place])
        check = Explanation(
            method="integrated gradients",
            baseline=float(found.baseline[place]),
            output=float(found.output[place]),
            rest=float(sums[place].sum() - sum(gain for _, gain in top)),
            residual=float(residual[place]),
            complete=bool(found.complete[place]),
        )
        spans = (weightiest_span(note, bytes_alone) if code == "note" else "" for code, _ in top)
        told.append((tuple((*reason, span) for reason, span in zip(top, spans, strict=True)), check))
    return told
