import json

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from r1jax.config import AlertConfig
from r1jax.data.transactions import DAY
from r1jax.errors import UserError
from r1jax.tasks.finance.alerts import ACTIONS, BANDS, make_policy
from r1jax.tasks.finance.evaluation import band_counts, evaluate, period_counts
from r1jax.tasks.finance.metrics import card_precision
from r1jax.tasks.finance.operating import operating_curve, operating_points, stored_curve
from tests.tasks.finance_period import MONDAY, frozen, period

SETTINGS = AlertConfig(per_day=6.0, step_up_per_day=20.0, block_probability=0.8)


@pytest.fixture(scope="module")
def measured():
    scored = period()
    policy, calibration = frozen(SETTINGS)
    probability = calibration(scored.score)
    weaker = np.random.default_rng(5).permutation(scored.score)
    scores = {"both": scored.score, "transactions": scored.score * np.float32(0.5), "text": weaker}
    return scored, policy, probability, evaluate(scored, scores, probability, policy, SETTINGS, resamples=40)


def test_every_figure_is_json_within_its_interval(measured):
    found = measured[-1]
    assert json.loads(json.dumps(found, allow_nan=False)) == found

    def check(entry):
        if isinstance(entry, dict):
            if entry.get("low") is not None:
                assert entry["low"] <= entry["value"] <= entry["high"]
            for inner in entry.values():
                check(inner)

    check(found)
    told = {"transactions": 4000, "first_day": "2018-08-06", "last_day": "2018-08-25", "days": 20}
    assert period_counts(measured[0]) == told


def test_figures_equal_their_references(measured):
    scored, _, probability, found = measured
    fraud, both = scored.fraud == 1, found["modes"]["both"]
    assert both["auprc"]["value"] == pytest.approx(average_precision_score(fraud, scored.score))
    assert both["auroc"]["value"] == pytest.approx(roc_auc_score(fraud, scored.score))
    assert found["calibration"]["probability"]["brier"]["value"] == pytest.approx(brier_score_loss(fraud, probability))
    cards = card_precision(fraud, scored.score.astype(np.float64), scored.customer, scored.day)
    assert both["card_precision"]["value"] == pytest.approx(cards.mean())
    called = scored.score >= both["at_rate"]["0.01"]["threshold"]
    assert both["at_rate"]["0.01"]["recall"]["value"] == pytest.approx(called[fraud].mean())
    assert called[~fraud].mean() <= 0.01
    assert found["accuracy"]["nothing_is_fraud"] == pytest.approx(1 - fraud.mean())


def test_a_monotone_change_gains_nothing_and_a_shuffle_loses(measured):
    gains = measured[-1]["differences"]
    assert gains["transactions"]["auprc"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert gains["text"]["auprc"]["low"] > 0.1


def test_calibrated_probabilities_err_less_than_scores(measured):
    errors = measured[-1]["calibration"]
    assert errors["probability"]["brier"]["value"] < errors["score"]["brier"]["value"]


def test_recall_is_told_by_scenario(measured):
    scored, _, _, found = measured
    kinds = found["scenarios"]
    assert list(kinds) == ["1", "2", "3"]
    assert sum(kind["frauds"] for kind in kinds.values()) == found["frauds"]
    assert kinds["1"]["recall"]["0.01"] > kinds["3"]["recall"]["0.01"] > kinds["2"]["recall"]["0.01"]
    total = sum(kind["frauds"] * kind["recall"]["0.01"] for kind in kinds.values()) / found["frauds"]
    assert total == pytest.approx(found["modes"]["both"]["at_rate"]["0.01"]["recall"]["value"])


def test_the_frozen_threshold_is_that_of_validation(measured):
    scored, policy, _, found = measured
    operating, alert = found["operating"], scored.score >= policy.review
    assert operating["threshold"] == policy.review
    assert operating["alerts_per_day"] == pytest.approx(alert.sum() / 20)
    assert 4 < operating["alerts_per_day"] < 9  # 6 were asked for, on another period
    weeks = found["weeks"]
    assert sum(week["alerts"] for week in weeks) == alert.sum() and [w["days"] for w in weeks] == [7, 7, 6]


def test_intervals_resample_days(measured):
    scored, policy, probability, found = measured
    rows = np.repeat(np.arange(len(scored.ids)), 3)  # what a day holds three times over tells no more than it did
    copied = scored._replace(
        ids=[f"{i}" for i in range(len(rows))],
        **{name: getattr(scored, name)[rows] for name in scored._fields if name != "ids"},
    )
    copies = evaluate(copied, {"both": copied.score}, probability[rows], policy, SETTINGS, resamples=40)
    for name in ("auprc", "auroc"):
        assert copies["modes"]["both"][name] == pytest.approx(found["modes"]["both"][name])


def test_unknown_labels_are_left_out(measured):
    scored, policy, probability, _ = measured
    hidden = scored._replace(fraud=np.where(np.arange(len(scored.ids)) < 3000, scored.fraud, np.nan).astype(np.float32))
    part = scored.part(np.arange(len(scored.ids)) < 3000)
    found, expected = (
        evaluate(one, {"both": one.score}, probability[: len(one.ids)], policy, SETTINGS, resamples=2)
        for one in (hidden, part)
    )
    assert found["modes"] == expected["modes"]
    assert found["labelled"] == 3000
    with pytest.raises(UserError, match="known label"):
        nothing = scored._replace(fraud=np.full_like(scored.fraud, np.nan))
        evaluate(nothing, {"both": scored.score}, probability, policy, SETTINGS)


def test_alerts_keep_their_budgets_where_they_were_set():
    scored = period(seed=1, start=MONDAY - 30 * DAY)
    policy, calibration = frozen(SETTINGS)
    bands = policy.bands(scored.score, calibration(scored.score))
    counts = band_counts(bands)
    assert sum(counts.values()) == len(scored.ids)
    assert counts["high"] + counts["critical"] == pytest.approx(6 * 20, abs=4)
    assert counts["elevated"] + counts["high"] + counts["critical"] == pytest.approx(20 * 20, rel=0.03)
    assert (calibration(scored.score)[bands == BANDS.index("critical")] >= 0.8).all()
    assert counts["critical"] > 10 and len(ACTIONS) == len(BANDS)


def test_alerts_can_be_set_by_false_positive_rate():
    scored = period(seed=1, start=MONDAY - 30 * DAY)
    policy, _ = frozen(AlertConfig(false_positive_rate=0.01))
    genuine = scored.score[scored.fraud == 0]
    kept = float((genuine >= policy.review).mean())
    assert 0.009 < kept <= 0.01
    assert policy.false_positive_rate == pytest.approx(kept)
    assert policy.recall == pytest.approx((scored.score[scored.fraud == 1] >= policy.review).mean())
    assert policy.origin == f"false positive rate of at most 1.000% on validation ({kept:.3%} there)"
    assert policy.step_up <= policy.review


@pytest.mark.parametrize("rate", [0.001, 0.0023, 0.003, 0.01, 0.05])
def test_a_false_positive_rate_is_never_exceeded_where_it_was_set(rate):
    for seed in range(5):
        scored = period(seed=seed)
        curve = operating_curve(scored.fraud, scored.score, 20)
        review, genuine = curve.for_rate(rate), scored.score[scored.fraud == 0]
        assert (genuine >= review).mean() <= rate
        next_lower = max(t for t in curve.threshold if t < review)
        assert (genuine >= next_lower).mean() > rate


def test_a_rate_that_no_threshold_keeps_raises_no_alert():
    fraud, score = np.array([0.0, 1.0, 0.0, 1.0]), np.array([1.0, 0.9, 0.8, 0.1])
    policy = make_policy(operating_curve(fraud, score, 1), AlertConfig(false_positive_rate=0.4))
    assert not (score.astype(np.float32) >= policy.review).any()
    assert (policy.recall, policy.false_positive_rate) == (0.0, 0.0) and "0.000% there" in policy.origin


def unlabelled(scored, share=0.5):
    """The same with a random part of the labels unknown."""
    hidden = np.random.default_rng(8).random(len(scored.ids)) < share
    return scored._replace(fraud=np.where(hidden, np.nan, scored.fraud).astype(np.float32))


def test_a_budget_of_alerts_counts_transactions_without_a_label_too():
    scored = unlabelled(period(n=8000))
    stored = operating_points(scored.fraud, scored.score, scored.days, "isotonic")
    policy = make_policy(stored_curve(stored["curve"]), SETTINGS)
    assert (scored.score >= policy.review).sum() / 20 == pytest.approx(6, abs=0.2)
    called = scored.score >= policy.review
    assert policy.recall == pytest.approx(called[scored.fraud == 1].mean(), abs=0.02)
    assert policy.n_positive + policy.n_negative == (~np.isnan(scored.fraud)).sum()


def test_alerts_and_costs_of_a_day_do_not_shrink_with_the_known_labels(measured):
    scored, policy, probability, full = measured
    half = evaluate(unlabelled(scored), {"both": scored.score}, probability, policy, SETTINGS, resamples=2)
    assert half["operating"]["alerts_per_day"] == full["operating"]["alerts_per_day"]
    threshold = half["modes"]["both"]["at_rate"]["0.01"]["threshold"]
    assert half["alerts_per_day"]["0.01"] == (scored.score >= threshold).sum() / 20
    lost = "without_alerts_per_day"
    assert half["costs"][lost] == pytest.approx(full["costs"][lost], rel=0.25)
    found, expected = (x["costs"]["sweep"][-1]["alerts_per_day"] for x in (half, full))
    assert found == pytest.approx(expected, rel=0.3)


def test_known_frauds_alone_give_no_figure_at_a_rate(measured):
    scored, policy, probability, _ = measured
    frauds = scored._replace(fraud=np.where(scored.fraud == 1, 1, np.nan).astype(np.float32))
    found = evaluate(frauds, {"both": scored.score}, probability, policy, SETTINGS, resamples=2)
    for at in found["modes"]["both"]["at_rate"].values():
        assert at["threshold"] is None
        assert all(at[name]["value"] is None for name in ("recall", "precision", "value_recall"))
    assert found["accuracy"]["model"] is None and found["scenarios"] == {}
    assert (
        found["operating"]["recall"]["value"] is not None and found["operating"]["false_positive_rate"]["value"] is None
    )


def test_what_is_stored_is_json_and_comes_back():
    scored = period()
    stored = operating_points(scored.fraud, scored.score.astype(np.float64), 20, "platt")
    back = json.loads(json.dumps(stored, allow_nan=False))
    assert stored_curve(back["curve"]) == stored_curve(stored["curve"])
    assert np.all(np.diff(back["curve"]["threshold"]) < 0) and np.all(np.diff(back["curve"]["recall"]) >= 0)
    assert back["curve"]["alerts_per_day"][-1] == len(scored.ids) / 20


def test_one_class_sets_nothing():
    assert operating_points(np.zeros(5), np.linspace(0, 1, 5), 1, "isotonic") == {}
    with pytest.raises(UserError, match="0 frauds among 5"):
        operating_curve(np.zeros(5), np.linspace(0, 1, 5), 1)
    with pytest.raises(UserError, match="0 frauds among 3"):
        operating_curve(np.array([0, 0, 0, np.nan, np.nan]), np.linspace(0, 1, 5), 1)
