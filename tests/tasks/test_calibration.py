"""Calibrations against scikit-learn and SciPy."""

import json

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.optimize
from sklearn.isotonic import IsotonicRegression

from r1jax.errors import UserError
from r1jax.tasks.calibration import (
    Isotonic,
    Platt,
    fit_isotonic,
    fit_platt,
    from_json,
    to_json,
)
from r1jax.tasks.metrics import expected_calibration_error


def overconfident(n=20000, seed=0):
    """Labels of a known probability, and scores that exaggerate it."""
    rng = np.random.default_rng(seed)
    log_odds = rng.normal(-2, 1.5, n)
    labels = rng.random(n) < 1 / (1 + np.exp(-log_odds))
    return labels, 1 / (1 + np.exp(-(2 * log_odds + 1)))


@st.composite
def labels_and_scores(draw):
    n = draw(st.integers(1, 30))
    scores = draw(hnp.arrays(np.float32, n, elements=st.sampled_from([0.0, 0.125, 0.25, 0.3, 0.5, 0.9, 1.0])))
    return draw(hnp.arrays(bool, n)), scores


@hypothesis.given(labels_and_scores())
def test_isotonic_equals_sklearn_but_for_certainty(drawn):
    labels, scores = drawn
    expected = IsotonicRegression(out_of_bounds="clip").fit(scores.astype(np.float64), labels).predict(scores)
    found = fit_isotonic(labels, scores)(scores)
    between = (expected > 0) & (expected < 1)
    np.testing.assert_allclose(found[between], expected[between], atol=1e-12)
    assert (found > 0).all() and (found < 1).all()


@hypothesis.given(labels_and_scores())
def test_calibrations_rise_and_survive_json(drawn):
    labels, scores = drawn
    grid = np.linspace(0, 1, 101)
    for calibration in (fit_isotonic(labels, scores), fit_platt(labels, scores)):
        assert (np.diff(calibration(grid)) >= 0).all()
        assert from_json(json.loads(json.dumps(to_json(calibration)))) == calibration


def test_platt_is_the_likeliest_sigmoid():
    labels, scores = overconfident(500)
    n, positives = len(labels), labels.sum()
    target = np.where(labels, (positives + 1) / (positives + 2), 1 / (n - positives + 2))
    x = np.log(scores / (1 - scores))
    loss = lambda w: np.sum(np.logaddexp(0, w[0] * x + w[1]) - target * (w[0] * x + w[1]))  # noqa: E731
    best = scipy.optimize.minimize(loss, [1.0, 0.0], tol=1e-12).x
    np.testing.assert_allclose(fit_platt(labels, scores), best, atol=1e-4)


@pytest.mark.parametrize("fit", [fit_isotonic, fit_platt])
def test_calibration_lowers_the_error_on_other_cases(fit):
    calibration = fit(*overconfident())
    labels, scores = overconfident(seed=1)
    assert expected_calibration_error(labels, scores) > 0.05
    assert expected_calibration_error(labels, calibration(scores)) < 0.015


def test_platt_of_scores_that_say_nothing_is_the_share():
    labels = np.arange(10) < 3
    assert fit_platt(labels, np.full(10, 0.2))(np.array([0.9]))[0] == pytest.approx(0.3, abs=0.05)
    assert fit_platt(labels, np.linspace(0.1, 0.9, 10)).slope == 0.0  # ranked the wrong way round


def test_separable_scores_do_not_make_platt_certain():
    labels = np.arange(20) >= 10
    found = fit_platt(labels, np.linspace(0.05, 0.95, 20))(np.array([0.05, 0.95]))
    assert 0 < found[0] < 0.2 and 0.8 < found[1] < 1


def test_nothing_to_calibrate_on_is_an_error():
    with pytest.raises(UserError, match="known label"):
        fit_isotonic(np.zeros(0), np.zeros(0))


def test_maps_are_plain_data():
    assert Isotonic((0.0, 0.5, 1.0), (0.1, 0.2, 0.9))(np.array([-1, 0.25, 2.0])).tolist() == pytest.approx(
        [0.1, 0.15, 0.9]
    )
    assert Platt(1.0, 0.0)(np.array([0.3]))[0] == pytest.approx(0.3)
