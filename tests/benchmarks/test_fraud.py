"""The fraud benchmark: summaries of the streams against their definitions, and a small run of all of it."""

import json
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

import train
from benchmarks import common, fraud
from benchmarks.fraud_summaries import LARGE, OBVIOUS, RUN, SUMMARIES, summaries
from r1jax.data.transaction_simulator import simulate
from r1jax.data.transactions import DAY
from r1jax.parallel.mesh import make_mesh

DELAY = 7 * DAY


@pytest.fixture(scope="module")
def table():
    return simulate(0, 40, 70)


@pytest.fixture(scope="module")
def told(table):
    return dict(zip(SUMMARIES, summaries(table, DELAY).T, strict=True))


def test_a_terminal_is_summarised_by_the_labels_that_are_known(table, told):
    checked = 0
    for row in np.flatnonzero(~np.isnan(told["terminal_fraud_age"]))[::7]:
        now = table.seconds[row]
        before = np.flatnonzero((table.terminal == table.terminal[row]) & (np.arange(len(table)) <= row))
        known = before[table.seconds[before] <= now - DELAY]
        frauds = known[(table.fraud[known] == 1) & (table.amount[known] <= OBVIOUS)]
        genuine = known[table.fraud[known] == 0]
        assert told["terminal_fraud_age"][row] == pytest.approx((now - table.seconds[frauds[-1]]) / DAY, rel=1e-6)
        assert told["terminal_genuine_since"][row] == (genuine > frauds[-1]).sum()
        assert told["terminal_unlabelled"][row] == len(before) - 1 - len(known)
        if table.seconds[frauds[-1]] - table.seconds[frauds[0]] <= RUN * DAY:
            assert told["terminal_run_frauds"][row] == len(frauds)
            assert told["terminal_run_age"][row] == pytest.approx((now - table.seconds[frauds[0]]) / DAY, rel=1e-6)
        checked += 1
    assert checked > 20


def test_a_customer_is_summarised_by_the_earlier_amounts(table, told):
    rows = np.flatnonzero(table.customer == table.customer[np.nanargmax(told["customer_large_7d"])])
    seconds, amount = table.seconds[rows], table.amount[rows].astype(np.float64)
    middle = np.array([np.nan if i == 0 else np.sort(amount[:i])[i // 2] for i in range(len(rows))])
    large = np.nan_to_num(amount / middle) > LARGE
    week = [(large[:i] & (seconds[:i] > at - 7 * DAY)).sum() for i, at in enumerate(seconds)]
    np.testing.assert_allclose(told["customer_median"][rows], middle, rtol=1e-6)
    np.testing.assert_array_equal(told["customer_large_7d"][rows], week)
    np.testing.assert_array_equal(told["customer_events"][rows], np.arange(len(rows)))
    assert large.any()


def test_labels_that_are_not_known_yet_change_nothing(table, told):
    now = table.seconds[-1]
    changed = table.fraud.copy()
    changed[table.seconds > now - DELAY] = 1 - changed[table.seconds > now - DELAY]
    again = summaries(replace(table, fraud=changed), DELAY)[-1]
    np.testing.assert_array_equal(again, [told[name][-1] for name in SUMMARIES])


@pytest.mark.slow
def test_a_small_run_puts_the_model_beside_both_peers(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lightgbm")
    monkeypatch.setattr(fraud, "TREES", 10)
    for module in (train, common):  # programs for one device compile in a fraction of the time
        monkeypatch.setattr(module, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    output = tmp_path / "fraud.json"
    small = ["--train.steps", "4", "--train.eval_every", "4", "--train.save_every", "4", "--train.warmup_steps", "1"]
    words = ["--config", "configs/finance.py:smoke", "--seeds", "1", "--resamples", "20"]
    words += ["--output", str(output), "--workdir", str(tmp_path / "runs"), "--", *small]
    monkeypatch.setattr(sys, "argv", ["fraud.py", *words])
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        fraud.main()
    report = json.loads(output.read_text())
    assert list(report["scorers"]) == ["r1jax", "LightGBM, 15 features", "LightGBM, 31 features"]
    peer = report["scorers"]["LightGBM, 31 features"]
    ours = report["scorers"]["r1jax"]["figures"]["auprc"]["value"]
    assert peer["gain"]["auprc"]["value"] == pytest.approx(ours - peer["figures"]["auprc"]["value"])
    assert report["runs"][0]["figures"]["auprc"]["value"] == pytest.approx(ours)
    assert "| LightGBM, 31 features |" in capsys.readouterr().out
