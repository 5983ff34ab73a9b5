"""What eval.py prints of a period of transactions."""

from typing import Any

from r1jax.serve.evaluate import Evaluation, shortest
from r1jax.tasks.finance.figures import COLUMNS, RATE
from r1jax.tasks.intervals import figure_text, percent


def closing_lines(run: Evaluation, metrics: dict[str, Any]) -> list[str]:
    """The headline figures, and where the files are.

    Args:
      run: What was evaluated.
      metrics: What metrics.json holds.

    Returns:
      Lines of text.
    """
    figures, counts, output = metrics["figures"], metrics["counts"], shortest(run.output)
    made = metrics["provenance"]
    told = [
        f"{made['data']['name']}: {counts['transactions']} transactions of {counts['days']} days, checkpoint of step "
        f"{made['checkpoint']['step']}",
        "",
    ]
    told += ["no label is known: nothing is measured"] if figures is None else _figure_lines(figures)
    told.append(f"labels are known after {metrics['label_delay_days']:g} days; no input sees one earlier")
    check = metrics["explanations"]
    if check is not None:
        told.append(
            f"reasons of {check['explained']} alerts: contributions add up to a difference of "
            f"{check['mean_difference']:.2f} but for {check['mean_residual']:.3f} on average, "
            f"{check['largest_residual']:.3f} at most; within {check['tolerance']:.0%} for {check['complete']}"
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
    modes, rate = figures["modes"], f"{RATE:g}"
    place = f"FPR {100 * RATE:g} %"
    rows = [
        (f"recall at {place}", "%", [mode["at_rate"][rate]["recall"] for mode in modes.values()]),
        (f"precision at {place}", "%", [mode["at_rate"][rate]["precision"] for mode in modes.values()]),
        (f"value recall at {place}", "%", [mode["at_rate"][rate]["value_recall"] for mode in modes.values()]),
        ("AUPRC", "1", [mode["auprc"] for mode in modes.values()]),
        ("AUROC", "1", [mode["auroc"] for mode in modes.values()]),
        ("card precision", "%", [mode["card_precision"] for mode in modes.values()]),
    ]
    lines = ["  " + " " * 24 + "".join(f"{COLUMNS[mode]:>26}" for mode in modes)]
    for title, unit, row in rows:
        cells = [" ".join(f"{value} ({interval})".split()) for value, interval in (figure_text(x, unit) for x in row)]
        lines.append(f"  {title:<24}" + "".join(f"{cell:>26}" for cell in cells))
    best = figures["ceilings"]
    if best:
        cells = [f"{100 * best[mode]:.1f} %" if best.get(mode) is not None else "-" for mode in modes]
        lines.append(f"  {'attainable recall':<24}" + "".join(f"{cell:>26}" for cell in cells))
    operating, accuracy = figures["operating"], figures["accuracy"]
    needed = figures["modes"]["both"]["rate_for_claimed_recall"]
    found, false = (
        figure_text(operating[name], unit)[0] for name, unit in (("recall", "%"), ("false_positive_rate", "rate"))
    )
    return [
        *lines,
        "",
        f"frozen threshold: {operating['alerts_per_day']:.1f} alerts a day, recall {found}, FPR {false} "
        f"(set by {operating['origin']})",
        f"at {place} of this period: {figures['alerts_per_day'][rate]:.1f} alerts a day, of all transactions",
        f"accuracy {percent(accuracy['model'])} at {place}; calling nothing fraud is right for "
        f"{100 * accuracy['nothing_is_fraud']:.2f} %",
        f"a recall of {100 * needed['recall']:.1f} % would need an FPR of {figure_text(needed, '%')[0]}",
    ]
