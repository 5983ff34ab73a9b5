"""Figures of fraud scores against brute force and scikit-learn."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from sklearn.metrics import roc_curve

from r1jax.tasks.finance import metrics as f

LEVELS = [0.0, 0.125, 0.25, 0.3, 0.5, 0.75, 0.9, 1.0]


@st.composite
def transactions(draw):
    """Few distinct scores, so that ties are common."""
    n = draw(st.integers(1, 40))
    return (
        draw(hnp.arrays(bool, n)),
        draw(hnp.arrays(np.float64, n, elements=st.sampled_from(LEVELS))),
        draw(hnp.arrays(np.float64, n, elements=st.integers(0, 50).map(float))),
    )


def brute(fraud, score, amount, rate):
    """Recall, precision and value recall of the best threshold within the rate, one threshold at a time."""
    best = (-1.0, np.nan, np.nan)
    for threshold in [np.inf, *np.unique(score)]:
        called = score >= threshold
        if (called & ~fraud).sum() <= rate * (~fraud).sum() + 1e-12:
            recall = (called & fraud).sum() / fraud.sum()
            precision = (called & fraud).sum() / called.sum() if called.any() else np.nan
            value = amount[called & fraud].sum() / amount[fraud].sum() if amount[fraud].sum() else np.nan
            # A lower threshold within the rate never has a smaller recall.
            if recall > best[0] or (recall == best[0] and called.sum() > 0):
                best = (recall, precision, value)
    return best


@hypothesis.given(transactions(), st.sampled_from([0.0, 0.003, 0.1, 0.25, 0.5, 1.0]))
def test_recall_at_a_rate_equals_brute_force(drawn, rate):
    fraud, score, amount = drawn
    hypothesis.assume(fraud.any() and not fraud.all())
    found = f.rank_fraud(fraud, score, amount).at_rate(rate)
    recall, _, _ = brute(fraud, score, amount, rate)
    assert found.recall[0] == pytest.approx(recall)
    threshold = f.rank_fraud(fraud, score, amount).counts.thresholds[found.index[0]]
    called = score >= threshold
    assert (called & ~fraud).sum() <= rate * (~fraud).sum() + 1e-12
    if called.any():
        assert found.precision[0] == pytest.approx(fraud[called].mean())
    if amount[fraud].sum():
        assert found.value_recall[0] == pytest.approx(amount[called & fraud].sum() / amount[fraud].sum())


def test_a_rate_that_is_met_exactly_is_kept():
    genuine = 1000
    for false in range(1, 60):  # false / 1000 as a decimal is rarely a binary number
        score = np.r_[np.full(false, 0.8), np.full(genuine - false, 0.1), 0.8, 0.05]
        fraud = np.r_[np.zeros(genuine, bool), True, True]
        assert f.rank_fraud(fraud, score, np.ones(len(fraud))).at_rate(false / genuine).recall[0] == 0.5


def test_recall_is_not_interpolated():
    fraud, score = np.array([True, False, True, False]), np.array([0.9, 0.8, 0.7, 0.1])
    ranking = f.rank_fraud(fraud, score, np.array([1.0, 5.0, 3.0, 5.0]))
    assert ranking.at_rate(0.49).recall[0] == 0.5 and ranking.at_rate(0.5).recall[0] == 1.0
    assert ranking.at_rate(0.49).value_recall[0] == 0.25


@hypothesis.given(transactions(), st.sampled_from([0.2, 0.5, 0.987, 1.0]))
def test_the_rate_that_a_recall_needs_equals_sklearn(drawn, recall):
    fraud, score, amount = drawn
    hypothesis.assume(fraud.any() and not fraud.all())
    rates, recalls, _ = roc_curve(fraud, score, drop_intermediate=False)
    found = f.rank_fraud(fraud, score, amount).rate_for(recall)[0]
    assert found == pytest.approx(rates[recalls >= recall - 1e-12].min())


def test_without_fraud_or_genuine_transactions_figures_are_undefined():
    ranking = f.rank_fraud(np.zeros(3, bool), np.arange(3.0), np.ones(3))
    assert np.isnan(ranking.at_rate(0.1).recall[0]) and np.isnan(ranking.rate_for(0.9)[0])
    frauds = f.rank_fraud(np.ones(3, bool), np.arange(3.0), np.ones(3))
    at = frauds.at_rate(0.1)
    assert np.isnan([at.recall[0], at.precision[0], at.value_recall[0], frauds.rate_for(0.9)[0]]).all()
    assert np.isinf(frauds.counts.thresholds[at.index[0]])


def test_weights_are_repetitions():
    rng = np.random.default_rng(0)
    fraud, score, amount = rng.random(50) < 0.3, np.round(rng.random(50), 1), rng.random(50)
    counts = rng.integers(0, 4, 50)
    weighted = f.rank_fraud(fraud, score, amount, counts[None].astype(np.float64))
    repeated = f.rank_fraud(*(np.repeat(x, counts) for x in (fraud, score, amount)))
    for rate in f.RATES + (0.2,):
        assert weighted.at_rate(rate).recall[0] == pytest.approx(repeated.at_rate(rate).recall[0])
        assert weighted.at_rate(rate).value_recall[0] == pytest.approx(repeated.at_rate(rate).value_recall[0])
    assert weighted.rate_for(0.9)[0] == pytest.approx(repeated.rate_for(0.9)[0])


def slow_card_precision(fraud, score, customer, day, cards):
    """The definition, card by card."""
    gone, shares = set(), []
    for today in sorted(set(day.tolist())):
        highest, bad = {}, set()
        for i in np.flatnonzero(day == today):
            card = int(customer[i])
            if card in gone:
                continue
            highest[card] = max(highest.get(card, -1.0), score[i])
            bad |= {card} if fraud[i] else set()
        seen = sorted(highest, key=lambda card: (-highest[card], card))[:cards]
        shares.append(sum(card in bad for card in seen) / cards)
        gone |= set(seen) & bad
    return shares


@hypothesis.given(transactions(), st.integers(0, 2**31), st.integers(1, 5))
def test_card_precision_equals_its_definition(drawn, seed, cards):
    fraud, score, _ = drawn
    rng = np.random.default_rng(seed)
    customer, day = rng.integers(0, 8, len(fraud)), np.sort(rng.integers(0, 4, len(fraud)))
    found = f.card_precision(fraud, score, customer, day, cards)
    np.testing.assert_allclose(found, slow_card_precision(fraud, score, customer, day, cards))


def test_costs_are_those_of_each_threshold():
    rng = np.random.default_rng(1)
    fraud, score, amount = rng.random(40) < 0.3, np.round(rng.random(40), 1), rng.integers(1, 90, 40).astype(float)
    curve = f.cost_curve(f.rank_fraud(fraud, score, amount), 5.0, 4)
    for threshold, alerts, cost in zip(*curve, strict=True):
        called = score >= threshold
        assert alerts == called.sum() / 4
        assert cost == pytest.approx((amount[fraud & ~called].sum() + 5 * called.sum()) / 4)
    assert curve.cost_per_day[curve.best()] == curve.cost_per_day.min()
    assert curve.cost_per_day[0] == pytest.approx(amount[fraud].sum() / 4)  # nothing is called


def test_weeks_are_counted_from_the_first_day():
    day = np.array([0, 6, 7, 13, 20, 20])
    fraud = np.array([False, True, False, False, True, False])
    alert = np.array([True, True, False, False, False, True])
    weeks = f.weekly(fraud, alert, day)
    assert [week["week"] for week in weeks] == [1, 2, 3]
    assert [week["false_positive_rate"]["value"] for week in weeks] == [1.0, 0.0, 1.0]
    assert [week["recall"] for week in weeks] == [1.0, None, 0.0]
    assert [week["alerts"] for week in weeks] == [2, 0, 1]
    assert weeks[1]["false_positive_rate"]["high"] > 0
