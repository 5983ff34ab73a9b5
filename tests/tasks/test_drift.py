"""Distances between distributions against SciPy and closed forms, and a threshold that keeps its share."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats

from r1jax.tasks.drift import drifts, follow, kolmogorov_smirnov, snapshot, stability_index


def test_the_stability_index_is_the_symmetric_relative_entropy():
    before, after = np.array([100_000, 300_000, 600_000]), np.array([200_000, 300_000, 500_000])
    p, q = before / before.sum(), after / after.sum()
    expected = scipy.stats.entropy(p, q) + scipy.stats.entropy(q, p)
    assert stability_index(before, after) == pytest.approx(expected, rel=1e-4)
    assert stability_index(before, before) == 0.0
    assert 1 < stability_index(np.array([50, 50]), np.array([0, 100])) < 10


@pytest.mark.parametrize("shift", [0.0, 0.1, 1.0])
def test_the_distance_of_a_sketch_is_that_of_the_sample(shift):
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=5000), rng.normal(shift, 1, 3000)
    quantiles = np.array(snapshot({"x": before})["x"]["quantiles"])
    expected = scipy.stats.ks_2samp(before, after).statistic
    assert kolmogorov_smirnov(quantiles, after) == pytest.approx(expected, abs=2e-3)


def test_injected_drift_is_found_and_nothing_else():
    rng = np.random.default_rng(1)

    def draw(n, scale=1.0, missing=0.02, risk=0.05):
        table = {
            "amount": rng.gamma(2, 40 * scale, n),
            "weekend": (rng.random(n) < 2 / 7).astype(np.float64),
            "risk": np.where(rng.random(n) < risk, rng.random(n), 0.0),
            "age": np.where(rng.random(n) < missing, np.nan, rng.random(n)),
        }
        return table

    before = json.loads(json.dumps(snapshot(draw(20_000))))
    assert max(drift.psi for drift in drifts(before, draw(5000))) < 0.02
    found = drifts(before, draw(5000, scale=1.5))
    assert found[0].name == "amount" and found[0].psi > 0.2 and found[0].ks > 0.15
    assert found[0].median_after > 1.3 * found[0].median_before and found[1].psi < 0.02
    assert drifts(before, draw(5000, missing=0.5))[0][0] == "age"
    assert drifts(before, draw(5000, missing=0.5))[0].missing_after == pytest.approx(0.5, abs=0.03)
    assert drifts(before, draw(5000, risk=0.5))[0][0] == "risk"


def test_a_column_may_be_empty():
    nothing = np.full(3, np.nan)
    found = drifts(snapshot({"x": nothing}), {"x": nothing})[0]
    assert found.psi == 0.0 and np.isnan(found.ks) and found.missing_after == 1.0


@hypothesis.given(st.lists(st.floats(0, 1), min_size=1, max_size=300), st.floats(0.001, 0.5), st.floats(0.01, 0.99))
def test_the_share_of_alerts_is_that_of_the_way_moved(scores, share, start):
    follower = follow(start, share)
    before = follower.log_odds
    alerts = sum(follower(score) for score in scores)
    moved = follower.log_odds - before
    assert alerts / len(scores) == pytest.approx(share + moved / (follower.step * len(scores)), abs=1e-9)


def test_a_threshold_follows_scores_that_have_drifted():
    rng = np.random.default_rng(2)
    before = 1 / (1 + np.exp(-rng.normal(-4, 1, 20_000)))
    later = 1 / (1 + np.exp(-rng.normal(-3, 1, 40_000)))  # every score has risen
    threshold = float(np.quantile(before, 0.99))
    assert (later >= threshold).mean() > 0.05
    follower = follow(threshold, 0.01)
    ways = [(follower(score), follower.threshold) for score in later.tolist()]
    alerts, thresholds = (np.array(column) for column in zip(*ways, strict=True))
    assert alerts[20_000:].mean() == pytest.approx(0.01, abs=0.002)
    assert np.median(thresholds[20_000:]) == pytest.approx(np.quantile(later, 0.99), rel=0.1)
    again = follow(threshold, 0.01)
    assert [again(score) for score in later[:500].tolist()] == alerts[:500].tolist()
