"""The fraud benchmark: a small run of all of it, and what stands in its result."""

import json
import sys

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import train
from benchmarks import common, fraud
from r1jax.data.transaction_history import FEATURES
from r1jax.data.transaction_simulator import simulate
from r1jax.data.transactions import DAY
from r1jax.parallel.mesh import make_mesh
from tests.data.streams import draw_table

ALL = f"LightGBM, {len(FEATURES)} features"
LATER = 80
"""Day on which the later file begins."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of a generated stream, and a file of the days after it."""
    stream, folder = simulate(0, 60, LATER + 10), tmp_path_factory.mktemp("stream")
    columns = {
        "TRANSACTION_ID": stream.ids,
        "TX_DATETIME": pa.array(stream.seconds, pa.timestamp("s")),
        "CUSTOMER_ID": stream.customers.take(pa.array(stream.customer)),
        "TERMINAL_ID": stream.terminals.take(pa.array(stream.terminal)),
        "TX_AMOUNT": pa.array(stream.amount),
        "TX_FRAUD": pa.array(stream.fraud),
    }
    later = (stream.seconds - stream.seconds[0]) // DAY >= LATER
    (folder / "earlier").mkdir()
    pq.write_table(pa.table(columns).filter(pa.array(~later)), folder / "earlier/part.parquet")
    pq.write_table(pa.table(columns).filter(pa.array(later)), folder / "later.parquet")
    return folder


@pytest.mark.slow
def test_a_small_run_puts_the_model_beside_both_peers_on_both_periods(files, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lightgbm")
    monkeypatch.setattr(fraud, "TREES", 10)
    for module in (train, common):  # programs for one device compile in a fraction of the time
        monkeypatch.setattr(module, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    output = tmp_path / "fraud.json"
    small = ["--model.modalities", "series", "table", "--task.modality_dropout", "0", "--train.steps", "4"]
    small += ["--train.eval_every", "4", "--train.save_every", "4", "--train.warmup_steps", "1"]
    words = ["--config", "configs/finance.py:smoke", "--data", str(files / "earlier"), "--resamples", "20"]
    words += ["--score", str(files / "later.parquet"), "--workdir", str(tmp_path / "runs"), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["fraud.py", *words, "--seeds", "0", "--", *small])
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        fraud.main()
    report = json.loads(output.read_text())
    assert report["data"]["split"] == "val" and report["later"]["data"]["split"] == "the later file"
    assert report["later"]["data"]["payments"] == pq.read_metadata(files / "later.parquet").num_rows
    for told in (report, report["later"]):
        assert list(told["scorers"]) == ["r1jax", "LightGBM, 15 features", ALL]
    ours, peer = (report["scorers"][name] for name in ("r1jax", ALL))
    difference = ours["figures"]["auprc"]["value"] - peer["figures"]["auprc"]["value"]
    assert peer["gain"]["auprc"]["value"] == pytest.approx(difference)
    assert report["runs"][0]["figures"]["auprc"] == pytest.approx(ours["figures"]["auprc"]["value"])
    assert capsys.readouterr().out.count(f"| {ALL} |") == 4  # of two periods, before and after the training


def test_intervals_of_a_gain_are_those_of_the_difference_on_the_same_days():
    """The model equals one peer, so that its gain over it is nothing on any day."""
    rng, stream = np.random.default_rng(0), draw_table(rows=600, unknown=0.0)

    class Cases:
        table, rows = stream, np.arange(len(stream))

    good, chance = stream.fraud + rng.normal(size=600), rng.normal(size=600)
    told = fraud.judge({"r1jax": good, "same": good, "chance": chance}, Cases, 20)
    assert all(set(figure.values()) == {0.0} for figure in told["same"]["gain"].values())
    assert told["chance"]["gain"]["auroc"]["low"] > 0.05 and "gain" not in told["r1jax"]
    assert told["r1jax"]["figures"] == told["same"]["figures"]
