"""Figures of merit against scikit-learn, brute force and hand-made cases."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import sklearn.calibration
import sklearn.metrics

from r1jax.errors import UserError
from r1jax.tasks import metrics as m


def cases(n, seed=0, tied=False):
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.3
    scores = 1 / (1 + np.exp(-(rng.normal(size=n) + 1.5 * labels - 1)))
    return labels, np.round(scores, 1) if tied else scores


@st.composite
def labels_and_scores(draw):
    """Few distinct scores, so that ties are common; any share of positives, including none and all."""
    n = draw(st.integers(1, 40))
    labels = draw(hnp.arrays(bool, n))
    scores = draw(hnp.arrays(np.float32, n, elements=st.sampled_from([0.0, 0.125, 0.25, 0.3, 0.5, 0.9, 1.0])))
    return labels, scores


@hypothesis.given(labels_and_scores())
def test_auc_and_average_precision_equal_sklearn_with_ties(drawn):
    labels, scores = drawn
    if labels.all() or not labels.any():
        assert np.isnan(m.roc_auc(labels, scores))
    else:
        assert m.roc_auc(labels, scores) == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores), abs=1e-12)
    if labels.any():
        expected = sklearn.metrics.average_precision_score(labels, scores)
        assert m.average_precision(labels, scores) == pytest.approx(expected, abs=1e-12)
    else:
        assert np.isnan(m.average_precision(labels, scores))


@pytest.mark.parametrize("tied", [False, True])
def test_curves_equal_sklearn(tied):
    labels, scores = cases(300, tied=tied)
    fpr, tpr, thresholds = sklearn.metrics.roc_curve(labels, scores, drop_intermediate=False)
    curve = m.roc_curve(labels, scores)
    np.testing.assert_allclose(curve.false_positive_rate, fpr, atol=1e-12)
    np.testing.assert_allclose(curve.sensitivity, tpr, atol=1e-12)
    np.testing.assert_array_equal(curve.thresholds, thresholds)
    precision, recall, thresholds = sklearn.metrics.precision_recall_curve(labels, scores)
    curve = m.precision_recall_curve(labels, scores)
    np.testing.assert_allclose(curve.precision, precision[::-1], atol=1e-12)
    np.testing.assert_allclose(curve.recall, recall[::-1], atol=1e-12)
    np.testing.assert_array_equal(curve.thresholds[1:], thresholds[::-1])


def brute_force(labels, scores, keep, share):
    """Every threshold in turn: best (sensitivity, specificity) whose `keep` reaches `share`."""
    best = None
    for threshold in [np.inf, *np.unique(scores)]:
        called = scores >= threshold
        point = {"sensitivity": called[labels].mean(), "specificity": (~called[~labels]).mean()}
        other = point["sensitivity" if keep == "specificity" else "specificity"]
        if point[keep] >= share and (best is None or other > best):
            best = other
    return best


@hypothesis.given(labels_and_scores(), st.sampled_from([0.0, 0.5, 0.9, 0.95, 1.0]))
def test_fixed_specificity_and_sensitivity_equal_brute_force(drawn, share):
    labels, scores = drawn
    if labels.all() or not labels.any():
        return
    point = m.sensitivity_at_specificity(labels, scores, share)
    assert point.sensitivity == pytest.approx(brute_force(labels, scores, "specificity", share))
    assert point.specificity >= share
    assert m.at_threshold(labels, scores, point.threshold) == pytest.approx(point)
    point = m.specificity_at_sensitivity(labels, scores, share)
    assert point.specificity == pytest.approx(brute_force(labels, scores, "sensitivity", share))
    assert point.sensitivity >= share
    assert m.at_threshold(labels, scores, point.threshold) == pytest.approx(point)


@hypothesis.given(labels_and_scores(), st.sampled_from([0.5, 0.9, 0.95, 1.0]))
def test_operating_point_does_what_it_says_when_applied(drawn, share):
    labels, scores = drawn
    if labels.all() or not labels.any():
        return
    point = m.operating_point(labels, scores, share)
    assert np.isfinite(point.threshold)
    assert m.at_threshold(labels, scores, point.threshold) == pytest.approx(point)
    assert point.sensitivity == m.sensitivity_at_specificity(labels, scores, share).sensitivity
    called = scores >= np.float32(point.threshold)  # as a server that computes in float32 would
    assert called[labels].mean() == pytest.approx(point.sensitivity)


def test_operating_point_lies_between_neighbouring_scores():
    labels, scores = np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.6, 0.9])
    assert m.operating_point(labels, scores, 1.0) == pytest.approx((0.5, 1.0, 1.0))


def test_single_class_leaves_figures_undefined():
    scores = np.array([0.1, 0.5, 0.7])
    for labels in (np.zeros(3), np.ones(3)):
        assert np.isnan(m.sensitivity_at_specificity(labels, scores, 0.9).sensitivity)
        assert np.isnan(m.specificity_at_sensitivity(labels, scores, 0.9).specificity)
    assert np.isnan(m.roc_auc(np.zeros(0), np.zeros(0)))


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1, 1], [0.1, np.nan, 0.2], r"score nan of case 1 \(1 of 3"),
        ([0, 1, 1], [0.1, 0.3, np.inf], "score inf of case 2"),
        ([0, 2, 1], [0.1, 0.3, 0.2], r"label 2 of case 1 .* neither 0 nor 1"),
        ([0, 1, np.nan], [0.1, 0.3, 0.2], "label nan of case 2"),
    ],
)
def test_bad_cases_are_named(labels, scores, message):
    for figure in (m.roc_auc, m.average_precision, m.brier_score, m.reliability_curve):
        with pytest.raises(UserError, match=message):
            figure(np.array(labels), np.array(scores))


def test_scores_beyond_one_are_no_probabilities():
    assert m.roc_auc(np.array([0, 1]), np.array([-3.0, 4.0])) == 1
    with pytest.raises(UserError, match=r"probability -3.0 of case 0"):
        m.brier_score(np.array([0, 1]), np.array([-3.0, 4.0]))


def test_brier_equals_sklearn():
    labels, scores = cases(200)
    assert m.brier_score(labels, scores) == pytest.approx(sklearn.metrics.brier_score_loss(labels, scores))


def test_reliability_equals_sklearn_and_gives_the_calibration_error():
    labels, scores = cases(200)
    observed, forecast = sklearn.calibration.calibration_curve(labels, scores, n_bins=10, strategy="quantile")
    curve = m.reliability_curve(labels, scores, bins=10)
    np.testing.assert_allclose(curve.forecast, forecast)
    np.testing.assert_allclose(curve.observed, observed)
    assert list(curve.count) == [20] * 10
    assert m.expected_calibration_error(labels, scores, bins=10) == pytest.approx(np.abs(observed - forecast).mean())


def test_calibration_error_of_known_cases():
    labels = np.array([0, 0, 1, 1])
    assert m.expected_calibration_error(labels, np.array([0.0, 0.0, 1.0, 1.0])) == 0
    assert m.expected_calibration_error(labels, np.full(4, 0.5)) == 0
    assert m.expected_calibration_error(labels, np.full(4, 0.9)) == pytest.approx(0.4)
    assert m.expected_calibration_error(1 - labels, np.array([0.0, 0.0, 1.0, 1.0])) == 1


@hypothesis.given(labels_and_scores(), st.randoms(use_true_random=False))
def test_calibration_does_not_depend_on_the_order_of_cases(drawn, random):
    labels, scores = drawn
    order = np.array(random.sample(range(len(labels)), len(labels)))
    first = m.expected_calibration_error(labels, scores, 5)
    assert m.expected_calibration_error(labels[order], scores[order], 5) == pytest.approx(first, abs=1e-12)


@hypothesis.given(st.integers(2, 30), st.integers(0, 1000))
def test_quadratic_kappa_equals_sklearn(n, seed):
    rng = np.random.default_rng(seed)
    truth, predicted = rng.integers(1, 6, n), rng.integers(1, 6, n)
    if len(np.unique(np.concatenate([truth, predicted]))) == 1:
        assert np.isnan(m.quadratic_kappa(truth, predicted))
    else:
        expected = sklearn.metrics.cohen_kappa_score(truth, predicted, labels=range(1, 6), weights="quadratic")
        assert m.quadratic_kappa(truth, predicted) == pytest.approx(expected, abs=1e-12)


def test_mean_absolute_error_of_unsigned_numbers():
    assert m.mean_absolute_error(np.array([3, 1], np.uint8), np.array([1, 2], np.uint8)) == 1.5


@hypothesis.given(st.integers(1, 30), st.integers(0, 1000))
def test_weights_are_repeated_cases(n, seed):
    """A row of counts gives what the cases give when each is repeated that often."""
    rng = np.random.default_rng(seed)
    labels, scores = rng.random(n) < 0.5, rng.choice([0.1, 0.2, 0.4, 0.8], n)
    weights = rng.integers(0, 4, (3, n)).astype(np.float64)
    ranking = m.rank(labels, scores, weights)
    for r, row in enumerate(weights.astype(int)):
        y, s = np.repeat(labels, row), np.repeat(scores, row)
        expected = m.rank(y, s)
        for figure in (m.Ranking.auc, m.Ranking.average_precision):
            np.testing.assert_allclose(figure(ranking)[r], figure(expected)[0])
        for level in (0.5, 0.9):
            np.testing.assert_allclose(ranking.sensitivity_at(level)[0][r], expected.sensitivity_at(level)[0][0])
            np.testing.assert_allclose(ranking.specificity_at(level)[0][r], expected.specificity_at(level)[0][0])
        np.testing.assert_allclose(m.quadratic_kappas(labels, scores > 0.3, weights)[r], m.quadratic_kappa(y, s > 0.3))
        if row.sum():
            assert m.weighted_mean(scores, weights)[r] == pytest.approx(s.mean())
            assert m.weighted_median(scores, weights)[r] == pytest.approx(np.median(s))


def auc_of(labels, scores):
    return lambda weights: {"auc": m.rank(labels, scores, weights).auc()}


def test_bootstrap_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(0).normal(size=400)
    estimate = m.bootstrap(lambda w: {"mean": m.weighted_mean(values, w)}, 400, resamples=4000)["mean"]
    half = 1.96 * values.std() / 20
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_interval_of_the_auc_equals_resampling_cases_one_by_one():
    labels, scores = cases(150)
    estimate = m.bootstrap(auc_of(labels, scores), 150, resamples=1000)["auc"]
    rng = np.random.default_rng(1)
    drawn = [rng.integers(0, 150, 150) for _ in range(1000)]
    slow = np.quantile([sklearn.metrics.roc_auc_score(labels[i], scores[i]) for i in drawn], [0.025, 0.975])
    assert estimate[1:] == pytest.approx(slow, abs=0.012)


def test_bootstrap_draws_the_same_for_a_seed_whatever_the_figures():
    labels, scores = cases(100)
    first = m.bootstrap(auc_of(labels, scores), 100, seed=3)
    both = m.bootstrap(lambda w: {"brier": m.weighted_mean(scores, w), **auc_of(labels, scores)(w)}, 100, seed=3)
    assert first["auc"] == both["auc"]
    assert first != m.bootstrap(auc_of(labels, scores), 100, seed=4)


def test_bootstrap_of_groups_widens_with_repeated_cases():
    """Every case five times over: resampling groups gives the interval of the cases themselves."""
    labels, scores = cases(120)
    single = m.bootstrap(auc_of(labels, scores), 120)["auc"]
    y, s, exam = (np.repeat(x, 5) for x in (labels, scores, np.array([f"exam {i}" for i in range(120)])))
    grouped = m.bootstrap(auc_of(y, s), 600, groups=exam)["auc"]
    naive = m.bootstrap(auc_of(y, s), 600)["auc"]
    assert grouped.high - grouped.low == pytest.approx(single.high - single.low, rel=0.1)
    assert naive.high - naive.low < 0.6 * (single.high - single.low)


def test_bootstrap_of_nothing_and_of_undefined_figures():
    labels, scores = cases(20)
    assert np.isnan(m.bootstrap(auc_of(np.zeros(20), scores), 20)["auc"]).all()
    assert np.isnan(m.bootstrap(auc_of(np.zeros(0), np.zeros(0)), 0)["auc"]).all()
    labels[:] = False
    labels[0] = True  # a third of the resamples has no positive case
    estimate = m.bootstrap(auc_of(labels, scores), 20)["auc"]
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1


def test_bootstrap_asks_for_many_resamples_at_once():
    labels, scores = cases(2048)
    asked = []

    def statistics(weights):
        asked.append(len(weights))
        ranking = m.rank(labels, scores, weights)
        levels = np.linspace(0.8, 0.99, 18)
        return {
            "auc": ranking.auc(),
            "ap": ranking.average_precision(),
            "ece": m.calibration_errors(labels, scores, weights),
            **{f"sensitivity {x}": ranking.sensitivity_at(x)[0] for x in levels},
            **{f"specificity {x}": ranking.specificity_at(x)[0] for x in levels},
        }

    assert len(m.bootstrap(statistics, 2048, resamples=500)) == 39
    assert asked == [1, 500]


def test_wilson_interval_of_published_values():
    """Newcombe 1998, table I, method 3: 81/263 and 0/20."""
    assert m.wilson_interval(81.0, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert m.wilson_interval(0.0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert m.wilson_interval(20.0, 20) == pytest.approx((0.8389, 1), abs=1e-4)
