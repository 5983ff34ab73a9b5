"""Figures of merit of fraud scores: what a rate of false alarms buys in transactions, cards and money (NumPy only).

"Recall at FPR x" is the largest recall over the thresholds whose false positive rate is at most x, without
interpolation: a threshold between two scores does not exist.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from r1jax.tasks import metrics as m

RATES = (0.001, 0.003, 0.01, 0.05)
"""False positive rates that recall is reported at."""
CARDS = 100
"""Cards that a day's investigators look at."""
_ROUNDING = 1e-9


class AtRate(NamedTuple):
    """What the lowest threshold that keeps a false positive rate yields, for R weightings of the transactions.

    Everything is NaN, and the threshold that of no call, where no genuine transaction says what keeps the rate.
    """

    index: Int[np.ndarray, "R"]
    """Of the threshold."""
    recall: Float[np.ndarray, "R"]
    precision: Float[np.ndarray, "R"]
    value_recall: Float[np.ndarray, "R"]
    """Share of the fraudulent amount."""


@dataclass(frozen=True)
class FraudRanking:
    """Transactions ranked by score, counted and in money, for R weightings of the same transactions.

    Attributes:
      counts: Frauds and genuine transactions at or above each threshold.
      money: Fraudulent amount at or above each threshold.
    """

    counts: m.Ranking
    money: Float[np.ndarray, "R K"]

    def at_rate(self, rate: float) -> AtRate:
        """Finds the largest recall whose false positive rate is at most `rate`."""
        tp, fp = self.counts.true_positives, self.counts.false_positives
        genuine = fp[:, -1] > 0
        index = np.where(genuine, (fp <= rate * fp[:, -1:] + _ROUNDING).sum(axis=1) - 1, 0)
        found, false, money = (np.take_along_axis(x, index[:, None], axis=1)[:, 0] for x in (tp, fp, self.money))
        precision = m.ratio(found, found + false)
        recall, value = m.ratio(found, tp[:, -1]), m.ratio(money, self.money[:, -1])
        return AtRate(index, *(np.where(genuine, x, np.nan) for x in (recall, precision, value)))

    def rate_for(self, recall: float) -> Float[np.ndarray, "R"]:
        """The smallest false positive rate at which at least this recall is reached."""
        tp, fp = self.counts.true_positives, self.counts.false_positives
        index = (tp < recall * tp[:, -1:] - _ROUNDING).sum(axis=1)
        rate = m.ratio(np.take_along_axis(fp, index[:, None], axis=1)[:, 0], fp[:, -1])
        return np.where(tp[:, -1] > 0, rate, np.nan)


def rank_fraud(
    fraud: Bool[np.ndarray, "n"],
    score: Float[np.ndarray, "n"],
    amount: Float[np.ndarray, "n"],
    weights: Float[np.ndarray, "R n"] | None = None,
) -> FraudRanking:
    """Ranks transactions by score.

    Args:
      fraud: Which are fraud.
      score: Higher is more suspicious.
      amount: Money that each moves, 0 or more.
      weights: Count of each transaction in each of R resamples; None counts every one once (R = 1).

    Returns:
      The ranking.
    """
    weights = np.ones((1, len(fraud))) if weights is None else weights
    counts = m.rank(fraud, score, weights)
    order = np.argsort(-score.astype(np.float64), kind="stable")
    called = np.searchsorted(-score[order].astype(np.float64), -counts.thresholds, side="right")
    stolen = np.where(fraud, amount.astype(np.float64), 0.0)[order]
    money = np.cumsum(weights[:, order] * stolen[None], axis=1)
    money = np.concatenate([np.zeros((len(weights), 1)), money], axis=1)
    return FraudRanking(counts, money[:, called])


def card_precision(
    fraud: Bool[np.ndarray, "n"],
    score: Float[np.ndarray, "n"],
    customer: Integer[np.ndarray, "n"],
    day: Integer[np.ndarray, "n"],
    cards: int = CARDS,
) -> Float[np.ndarray, "days"]:
    """Share of compromised cards among the highest-scored ones of each day.

    A card counts by its highest score of the day; one that was found compromised is blocked, and left out afterwards.
    Source: Le Borgne et al., Reproducible Machine Learning for Credit Card Fraud Detection, chapter 4 (top-k).

    Args:
      fraud: Which transactions are fraud.
      score: Higher is more suspicious.
      customer: Card of each.
      day: Number of the day of each.
      cards: Looked at on each day.

    Returns:
      One share for each day that has transactions, in order.
    """
    found, shares = np.zeros(0, customer.dtype), []
    for today in np.unique(day):
        rows = np.flatnonzero((day == today) & ~np.isin(customer, found))
        card, member = np.unique(customer[rows], return_inverse=True)
        highest, compromised = np.full(len(card), -np.inf), np.zeros(len(card), bool)
        np.maximum.at(highest, member, score[rows])
        np.logical_or.at(compromised, member, fraud[rows])
        seen = np.lexsort((card, -highest))[:cards]
        shares.append(compromised[seen].sum() / cards)
        found = np.union1d(found, card[seen][compromised[seen]])
    return np.array(shares)


class CostCurve(NamedTuple):
    """What fraud and its investigation cost a day at each threshold."""

    threshold: Float[np.ndarray, "K"]
    alerts_per_day: Float[np.ndarray, "K"]
    cost_per_day: Float[np.ndarray, "K"]
    """Fraudulent amount that is let pass, and the cost of the alerts."""

    def best(self) -> int:
        """Index of the cheapest threshold."""
        return int(np.argmin(self.cost_per_day))


def cost_curve(ranking: FraudRanking, review_cost: float, days: int | float) -> CostCurve:
    """Costs of every threshold: each alert is looked at, and stops the fraud it is raised for.

    Args:
      ranking: Of the transactions, each counted once.
      review_cost: Of one alert, in the currency of the amounts.
      days: Over which the transactions spread.

    Returns:
      The curve, from no alert at all to an alert for every transaction.
    """
    counts, money = ranking.counts, ranking.money[0]
    alerts = counts.true_positives[0] + counts.false_positives[0]
    return CostCurve(counts.thresholds, alerts / days, (money[-1] - money + review_cost * alerts) / days)


def weekly(
    fraud: Bool[np.ndarray, "n"], alert: Bool[np.ndarray, "n"], day: Integer[np.ndarray, "n"]
) -> list[dict[str, Any]]:
    """What a frozen threshold does week after week, counted from day 0; the last week may be short.

    Args:
      fraud: Which transactions are fraud.
      alert: Which of them are called.
      day: Number of the day of each.

    Returns:
      For each week with transactions: counts, the realised false positive rate with Wilson's interval, and recall.
    """
    weeks = []
    for week in np.unique(day // 7):
        rows = day // 7 == week
        genuine, frauds = int((rows & ~fraud).sum()), int((rows & fraud).sum())
        false, found = int((rows & ~fraud & alert).sum()), int((rows & fraud & alert).sum())
        low, high = m.wilson_interval(float(false), genuine)
        weeks.append(
            {
                "week": int(week) + 1,
                "days": len(np.unique(day[rows])),
                "transactions": genuine + frauds,
                "frauds": frauds,
                "alerts": false + found,
                "false_positive_rate": {
                    "value": false / genuine if genuine else None,
                    "low": low if genuine else None,
                    "high": high if genuine else None,
                },
                "recall": found / frauds if frauds else None,
            }
        )
    return weeks
