"""Every figure of a scored period, with intervals that resample whole days, as JSON."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from r1jax.config import AlertConfig
from r1jax.errors import UserError
from r1jax.tasks import metrics as m
from r1jax.tasks.finance import metrics as f
from r1jax.tasks.finance.alerts import ALERT, BANDS, Policy
from r1jax.tasks.finance.figures import RATE
from r1jax.tasks.finance.scored import ScoredTransactions
from r1jax.tasks.intervals import Draw, finite

CLAIMED_RECALL = 0.987
"""Recall of the often quoted "98.7 % at 0.3 %": the rate that it would really need is reported."""
AT_RATE = ("recall", "precision", "value_recall")
GAINS = ("auprc", f"recall {RATE:g}")
"""Figures of both together that are compared with those of each alone."""
ECE_BINS = 15
REVIEW_COSTS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)


def evaluate(
    scored: ScoredTransactions,
    scores: dict[str, Float[np.ndarray, "N"]],
    probability: Float[np.ndarray, "N"],
    policy: Policy,
    settings: AlertConfig,
    *,
    ceilings: dict[str, float] | None = None,
    resamples: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures the transactions whose label is known.

    Args:
      scored: The period.
      scores: By mode of the task, the fused one as "both"; before calibration.
      probability: Fused, after calibration.
      policy: Thresholds that were frozen on validation.
      settings: Cost of an alert.
      ceilings: By mode the largest recall at a false positive rate of 0.3 % that anyone could reach, where it is known.
      resamples: Bootstrap resamples of days.
      seed: Of the resamples.

    Returns:
      Counts, "modes", "differences", "accuracy", "calibration", "alerts_per_day", "operating", "weeks", "scenarios"
      and "costs". Alerts a day are those of all transactions, with and without a known label, but in "weeks".

    Raises:
      UserError: No label is known, or a score is not finite.
    """
    known = scored.labelled
    if not known.any():
        raise UserError("no transaction has a known label: there is nothing to measure; leave the figures to later")
    every, alerts = scored, policy.bands(scores["both"], probability) >= ALERT
    all_scores = scores["both"].astype(np.float64)
    scored, probability, alert = scored.part(known), probability[known], alerts[known]
    scores = {mode: score[known].astype(np.float64) for mode, score in scores.items()}
    fraud, draw = scored.fraud == 1, Draw(resamples, seed, scored.day)
    modes, gains = _ranked(scored, fraud, scores, draw)
    return {
        "labelled": len(fraud),
        "frauds": int(fraud.sum()),
        "fraud_share": float(fraud.mean()),
        "fraud_amount": float(scored.amount[fraud].sum(dtype=np.float64)),
        "interval": "95 % percentile bootstrap over days",
        "resamples": resamples,
        "seed": seed,
        "ceilings": {mode: finite(value) for mode, value in (ceilings or {}).items()},
        "modes": modes,
        "differences": gains,
        "accuracy": _accuracy(fraud, scores["both"], modes["both"]),
        "calibration": _calibration(fraud, scores["both"], probability, draw),
        "alerts_per_day": _alerts_per_day(all_scores, modes["both"], every.days),
        "operating": {"alerts_per_day": float(alerts.sum() / every.days)}
        | _operating(scored, fraud, alert, policy, draw),
        "weeks": f.weekly(fraud, alert, scored.day),
        "scenarios": _scenarios(scored, scores["both"], modes["both"]),
        "costs": _costs(f.rank_fraud(fraud, scores["both"], scored.amount), settings, labelled_days(every)),
    }


def period_counts(scored: ScoredTransactions) -> dict[str, Any]:
    """How many transactions there are, and when; at least one."""
    first, last = (datetime.fromtimestamp(int(x), UTC).strftime("%Y-%m-%d") for x in scored.seconds[[0, -1]])
    return {"transactions": len(scored.ids), "first_day": first, "last_day": last, "days": scored.days}


def labelled_days(scored: ScoredTransactions) -> float:
    """Days that the known labels are worth: costs of these alone are scaled up as if they were a random part."""
    return scored.days * float(scored.labelled.mean())


def _alerts_per_day(score: Float[np.ndarray, "N"], mode: dict[str, Any], days: int) -> dict[str, float]:
    """What the threshold of each rate raises a day, among all transactions."""
    found = {rate: at["threshold"] for rate, at in mode["at_rate"].items()}
    return {rate: 0.0 if at is None else float((score >= at).sum() / days) for rate, at in found.items()}


def band_counts(bands: np.ndarray) -> dict[str, int]:
    """How many transactions each band holds."""
    return {name: int((bands == index).sum()) for index, name in enumerate(BANDS)}


def _ranked(
    scored: ScoredTransactions, fraud: Bool[np.ndarray, "n"], scores: dict[str, Float[np.ndarray, "n"]], draw: Draw
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ranking figures of each mode, and what both together gain over each alone, all on the same resamples.

    Thresholds are those of these transactions themselves.
    """
    # Sorted once: each resample then sorts what is sorted already, in linear time.
    orders = {mode: np.argsort(-score, kind="stable") for mode, score in scores.items()}

    def statistics(weights: Float[np.ndarray, "R n"]) -> dict[str, Float[np.ndarray, "R"]]:
        found = {}
        for mode, order in orders.items():
            part = (x[order] for x in (fraud, scores[mode], scored.amount))
            ranking = f.rank_fraud(*part, weights[:, order])
            found |= {f"{mode} {name}": value for name, value in _figures_of(ranking).items()}
        for mode in orders:
            if mode != "both":
                found |= {f"gain {mode} {name}": found[f"both {name}"] - found[f"{mode} {name}"] for name in GAINS}
        return found

    figures = draw.figures(statistics, len(fraud))
    modes = {}
    for mode, score in scores.items():
        own = {name.removeprefix(f"{mode} "): x for name, x in figures.items() if name.startswith(f"{mode} ")}
        modes[mode] = _mode(scored, fraud, score, own, draw)
    alone = [mode for mode in scores if mode != "both"]
    return modes, {mode: {name: figures[f"gain {mode} {name}"] for name in GAINS} for mode in alone}


def _figures_of(ranking: f.FraudRanking) -> dict[str, Float[np.ndarray, "R"]]:
    found = {
        "auprc": ranking.counts.average_precision(),
        "auroc": ranking.counts.auc(),
        "rate_for_claimed_recall": ranking.rate_for(CLAIMED_RECALL),
    }
    for rate in f.RATES:
        at = ranking.at_rate(rate)
        found |= {f"{name} {rate:g}": getattr(at, name) for name in AT_RATE}
    return found


def _mode(
    scored: ScoredTransactions,
    fraud: Bool[np.ndarray, "n"],
    score: Float[np.ndarray, "n"],
    figures: dict[str, Any],
    draw: Draw,
) -> dict[str, Any]:
    """The figures of one mode as they are written."""
    ranking = f.rank_fraud(fraud, score, scored.amount)
    at_rate = {}
    for rate in f.RATES:
        threshold = ranking.counts.thresholds[ranking.at_rate(rate).index[0]]
        at_rate[f"{rate:g}"] = {"threshold": finite(threshold)} | {
            name: figures[f"{name} {rate:g}"] for name in AT_RATE
        }
    daily = f.card_precision(fraud, score, scored.customer, scored.day)
    cards = Draw(draw.resamples, draw.seed, None).figures(
        lambda weights: {"card_precision": m.weighted_mean(daily, weights)}, len(daily)
    )
    return {
        "auprc": figures["auprc"],
        "auroc": figures["auroc"],
        "at_rate": at_rate,
        "rate_for_claimed_recall": figures["rate_for_claimed_recall"] | {"recall": CLAIMED_RECALL},
        "card_precision": cards["card_precision"] | {"cards": f.CARDS},
    }


def _accuracy(fraud: Bool[np.ndarray, "n"], score: Float[np.ndarray, "n"], mode: dict[str, Any]) -> dict[str, Any]:
    """Accuracy at the headline rate, never without that of calling nothing fraud; None where nothing is genuine."""
    threshold = mode["at_rate"][f"{RATE:g}"]["threshold"]
    called = np.zeros(len(fraud), bool) if threshold is None else score >= threshold
    return {
        "at_rate": RATE,
        "model": None if fraud.all() else float((called == fraud).mean()),
        "nothing_is_fraud": float((~fraud).mean()),
    }


def _calibration(
    fraud: Bool[np.ndarray, "n"], score: Float[np.ndarray, "n"], probability: Float[np.ndarray, "n"], draw: Draw
) -> dict[str, Any]:
    """Errors before and after the calibration, and the bins of the diagram."""

    def statistics(weights: Float[np.ndarray, "R n"]) -> dict[str, Float[np.ndarray, "R"]]:
        found = {}
        for name, forecast in (("score", score), ("probability", probability)):
            found[f"{name} ece"] = m.calibration_errors(fraud, forecast, weights, ECE_BINS)
            found[f"{name} brier"] = m.weighted_mean(np.square(forecast - fraud), weights)
        return found

    figures = draw.figures(statistics, len(fraud))
    bins = m.reliability_curve(fraud, probability, ECE_BINS)
    return {
        "score": {name: figures[f"score {name}"] for name in ("ece", "brier")},
        "probability": {name: figures[f"probability {name}"] for name in ("ece", "brier")},
        "bins": {name: column.tolist() for name, column in bins._asdict().items()},
    }


def _operating(
    scored: ScoredTransactions,
    fraud: Bool[np.ndarray, "n"],
    alert: Bool[np.ndarray, "n"],
    policy: Policy,
    draw: Draw,
) -> dict[str, Any]:
    """What the frozen alert threshold does on these transactions."""
    amount = scored.amount.astype(np.float64)

    def statistics(weights: Float[np.ndarray, "R n"]) -> dict[str, Float[np.ndarray, "R"]]:
        return {
            "recall": m.weighted_mean(alert, weights * fraud[None]),
            "precision": m.weighted_mean(fraud, weights * alert[None]),
            "false_positive_rate": m.weighted_mean(alert, weights * ~fraud[None]),
            "value_recall": m.weighted_mean(alert, weights * (amount * fraud)[None]),
        }

    return {
        "threshold": policy.review,
        "origin": policy.origin,
        "on_validation": {"recall": policy.recall, "false_positive_rate": policy.false_positive_rate},
        **draw.figures(statistics, len(fraud)),
    }


def _scenarios(scored: ScoredTransactions, score: Float[np.ndarray, "n"], mode: dict[str, Any]) -> dict[str, Any]:
    """Recall of each kind of simulated fraud at each rate, by the thresholds of all transactions together."""
    if scored.scenario is None or not (scored.fraud == 0).any():
        return {}
    result = {}
    for kind in np.unique(scored.scenario[scored.fraud == 1]):
        members = scored.scenario == kind
        recall = {
            rate: 0.0 if at["threshold"] is None else float((score[members] >= at["threshold"]).mean())
            for rate, at in mode["at_rate"].items()
        }
        result[str(kind)] = {"frauds": int(members.sum()), "recall": recall}
    return result


def _costs(ranking: f.FraudRanking, settings: AlertConfig, days: float) -> dict[str, Any]:
    """The cheapest threshold at the cost of a review, and how that depends on it."""
    sweep = []
    for cost in sorted({*REVIEW_COSTS, settings.review_cost}):
        curve = f.cost_curve(ranking, cost, days)
        best = curve.best()
        sweep.append(
            {
                "review_cost": cost,
                "threshold": finite(curve.threshold[best]),
                "alerts_per_day": float(curve.alerts_per_day[best]),
                "cost_per_day": float(curve.cost_per_day[best]),
            }
        )
    nothing = float(f.cost_curve(ranking, 0.0, days).cost_per_day[0])
    return {"review_cost": settings.review_cost, "without_alerts_per_day": nothing, "sweep": sweep}
