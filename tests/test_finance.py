"""Payments from a file to a trained checkpoint, its evaluation, a later period with history, and the drift of that."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
from jax.sharding import AxisType
from sklearn.metrics import average_precision_score

import eval as command
import train
from r1jax.__main__ import dispatch
from r1jax.arguments import EvalArguments, EvalData
from r1jax.config import Config, DataConfig, FinanceConfig, TaskConfig
from r1jax.data.transaction_history import FEATURES, History
from r1jax.data.transaction_simulator import simulate
from r1jax.data.transactions import DAY
from r1jax.errors import UserError
from r1jax.serve.evaluate import scoring_task
from r1jax.serve.risk_reports import from_tree, read_xml
from r1jax.tasks.finance.task import Finance
from r1jax.train.checkpoints import find_checkpoint
from tests.serve.structure import Structure

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "--task.finance.events=4",
    "--task.finance.alerts.per_day=3",
    "--task.finance.alerts.step_up_per_day=6",
    "--model.series.layers=0",
    "--model.series.bins=4",
    "--model.table.layers=0",
    "--model.text_tokens=24",
    "--model.decoder.num_hidden_layers=1",
    "--model.decoder.hidden_size=16",
    "--model.decoder.moe_intermediate_size=8",
    "--train.steps=4",
    "--train.warmup_steps=1",
    "--train.eval_every=4",
    "--train.batch_size=16",
    "--train.ema=0",
]
FIRST_LATER = 60
"""Day on which the later file begins."""


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Programs for one device compile in a fraction of the time."""

    def make_mesh(_config):
        return jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_mesh", make_mesh)
        patch.setattr(command, "make_mesh", make_mesh)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A stream that is cut in two: earlier.parquet and later.parquet; the latter also without labels, and dearer."""
    stream = simulate(3, 60, FIRST_LATER + 10)
    columns = {
        "TRANSACTION_ID": stream.ids,
        "TX_DATETIME": pa.array(stream.seconds, pa.timestamp("s")),
        "CUSTOMER_ID": stream.customers.take(pa.array(stream.customer)),
        "TERMINAL_ID": stream.terminals.take(pa.array(stream.terminal)),
        "TX_AMOUNT": pa.array(stream.amount),
        "TX_FRAUD": pa.array(stream.fraud),
        "TX_FRAUD_SCENARIO": pa.array(stream.scenario.astype(np.int64)),
        "TX_TEXT": stream.text,
    }
    folder, table = tmp_path_factory.mktemp("streams"), pa.table(columns)
    later = stream.seconds >= stream.seconds[0] // DAY * DAY + FIRST_LATER * DAY
    pq.write_table(table.filter(pa.array(~later)), folder / "earlier.parquet")
    table = table.filter(pa.array(later))
    pq.write_table(table, folder / "later.parquet")
    place = table.column_names.index("TX_AMOUNT")
    dear = pa.array(4 * table["TX_AMOUNT"].to_numpy())
    pq.write_table(table.set_column(place, "TX_AMOUNT", dear), folder / "drifted.parquet")
    unlabelled = table.drop_columns(["TX_FRAUD", "TX_FRAUD_SCENARIO"])
    pq.write_table(unlabelled, folder / "unlabelled.parquet")
    return folder


def score(run: Path, *words: object) -> int:
    return command.main(
        ["--checkpoint", str(run), "--resamples", "5", "--batch-size", "64", "--reasons", "8", *map(str, words)]
    )


@pytest.fixture(scope="module")
def run(files, tmp_path_factory) -> Path:
    """A trained run, evaluated on its own test period."""
    workdir = tmp_path_factory.mktemp("run")
    config = ["--config", str(ROOT / "configs/finance.py") + ":smoke", "--data.path", str(files / "earlier.parquet")]
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        assert train.main([*config, *TINY, "--workdir", str(workdir)]) == 0
    assert score(run := workdir) == 0
    return run


@pytest.fixture(scope="module")
def later(run, files) -> Path:
    """The later file, scored by the same checkpoint."""
    assert score(run, "--data.path", files / "later.parquet", "--reasons", 0, "--output", run / "later") == 0
    return run / "later"


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_figures_are_those_of_the_scores(run):
    found, table = metrics(run / "eval"), pq.read_table(run / "eval/scores.parquet").to_pydict()
    fraud = np.array(table["fraud"])
    assert found["counts"]["transactions"] == len(fraud) and found["figures"]["frauds"] == fraud.sum()
    for mode in ("both", "transactions", "text"):
        expected = average_precision_score(fraud, np.array(table[f"score.{mode}"]))
        assert found["figures"]["modes"][mode]["auprc"]["value"] == pytest.approx(expected)
    assert np.all(np.diff(np.array(table["probability"])[np.argsort(table["score.both"])]) >= 0)
    assert (
        found["policy"]["origin"] == "3 alerts a day on validation"
        and found["provenance"]["data"]["seen_in_training"] == 0
    )
    assert any("notes are longer than 23 bytes" in line for line in found["warnings"])


def test_alerts_are_reported_with_reasons_that_add_up(run):
    found, lines = metrics(run / "eval"), (run / "eval/alerts.jsonl").read_text().splitlines()
    reports = [from_tree(json.loads(line)) for line in lines]
    assert len(reports) == found["alerts"] > 8
    table = pq.read_table(run / "eval/scores.parquet").to_pydict()
    alerts = [name for name, action in zip(table["id"], table["action"], strict=True) if action in ("review", "block")]
    assert [report.case_id for report in reports] == alerts
    explained = [report for report in reports if report.explanation is not None]
    assert len(explained) == 8
    assert min(r.score for r in explained) >= max(r.score for r in reports if r.explanation is None)
    for report in explained:
        told = report.explanation
        parts = sum(reason.contribution for reason in report.reasons) + told.rest + told.residual
        assert parts == pytest.approx(told.output - told.baseline, abs=1e-6)
    check = found["explanations"]
    assert check["complete"] == check["explained"] == 8
    for report in explained:
        assert report.score == pytest.approx(1 / (1 + np.exp(-report.explanation.output)), rel=1e-3)
    for report in reports:
        assert read_xml((run / f"eval/reports/{report.case_id}.xml").read_text("utf-8")) == report
        assert report.provenance.checkpoint_sha256 == found["provenance"]["checkpoint"]["sha256"]
    assert any(report.reasons for report in explained)
    assert "alerts" in Structure((run / "eval/index.html").read_text("utf-8")).text


def test_a_later_file_is_scored_with_the_earlier_one_as_history(run, later, files):
    found, table = metrics(later), pq.read_table(later / "scores.parquet")
    assert found["counts"]["transactions"] == pq.read_metadata(files / "later.parquet").num_rows == table.num_rows
    stream = simulate(3, 60, FIRST_LATER + 10)
    whole = History(stream, 7 * DAY, 4).features[-table.num_rows :]
    for i, name in enumerate(FEATURES):
        np.testing.assert_allclose(table[f"feature.{name}"].to_numpy(), whole[:, i], rtol=1e-6)
    assert found["policy"] == metrics(run / "eval")["policy"]


def answers(run, files, rows, monkeypatch, capsys, *words):
    """What `r1jax score` says to rows, as it were on standard input, and its exit code."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("".join(rows).encode())))
    words = ["score", str(run), "--history", str(files / "earlier.parquet"), *map(str, words)]
    capsys.readouterr()
    code = dispatch(words)
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_payments_are_scored_as_they_come_in_as_eval_scores_them(run, later, files, tmp_path, monkeypatch, capsys):
    columns = pq.read_table(files / "later.parquet").drop_columns(["TX_FRAUD_SCENARIO"]).slice(0, 300)
    rows = [json.dumps(row, default=str) + "\n" for row in columns.to_pylist()]
    told = ("--state", tmp_path / "state", "--batch", 8)
    code, first = answers(run, files, rows[:100], monkeypatch, capsys, *told, "--reasons", "alerts")
    assert code == 0 and [row["row"] for row in first] == list(range(1, 101))
    wrong = [rows[99], rows[100].replace("TX_TEXT", "TEXT"), '{"TRANSACTION_ID": "nobody", "TX_FRAUD": 1}\n']
    wrong.append(json.dumps({"TRANSACTION_ID": first[0]["id"], "TX_FRAUD": ""}) + "\n")
    code, rest = answers(run, files, [*wrong, *rows[100:]], monkeypatch, capsys, *told)
    assert code == 2 and "came before" in rest[0]["error"] and "did you mean 'TX_TEXT'" in rest[1]["error"]
    assert rest[2] == {"row": 3, "id": "nobody", "fraud": True, "held": False}
    assert "TX_DATETIME is missing" in rest[3]["error"]
    found, wanted = [*first, *rest[4:]], pq.read_table(later / "scores.parquet").slice(0, 300).to_pydict()
    for name, column in (("id", "id"), ("band", "band"), ("action", "action")):
        assert [row[name] for row in found] == wanted[column]
    for name, column in (("score", "score.both"), ("probability", "probability")):
        np.testing.assert_allclose([row[name] for row in found], wanted[column], atol=1e-6)
    explained = [row for row in first if "reasons" in row]
    assert [row["id"] for row in explained] == [row["id"] for row in first if row["action"] in ("review", "block")]
    assert all(row["complete"] for row in explained) and any(row["reasons"] for row in explained)


def test_what_a_stream_cannot_be_scored_with_is_refused(run, files, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    assert dispatch(["score", str(run)]) == 0
    assert "have no past" in capsys.readouterr().err
    with pytest.raises(UserError, match="--reasons alerts needs a typical payment"):
        dispatch(["score", str(run), "--reasons", "alerts"])


def test_a_budget_can_be_given(run, files, tmp_path, capsys):
    words = ("--data.path", files / "later.parquet", "--reasons", 0, "--output", tmp_path / "out")
    assert score(run, *words, "--alerts-per-day", 1.5) == 0
    found, told = metrics(tmp_path / "out"), capsys.readouterr().out
    alerts = found["figures"]["alerts_per_day"]["0.003"]
    assert f"at FPR 0.3 % of this period: {alerts:.1f} alerts a day" in told
    assert "labels are known after 7 days" in told
    assert found["policy"]["origin"] == "1.5 alerts a day on validation" and found["explanations"] is None
    assert found["policy"]["review"] > metrics(run / "eval")["policy"]["review"]


def test_what_has_no_label_yet_is_scored_and_not_measured(run, files, tmp_path):
    assert score(run, "--data.path", files / "unlabelled.parquet", "--reasons", 0, "--output", tmp_path / "out") == 0
    found = metrics(tmp_path / "out")
    assert found["figures"] is None and found["alerts"] > 0 and found["label_delay_days"] == 7
    assert pq.read_table(tmp_path / "out/scores.parquet")["fraud"].null_count == found["counts"]["transactions"]


def test_the_subsample_of_training_is_no_period_to_score(run, tmp_path):
    with pytest.raises(UserError, match=r"data\.split train holds only 20% of the genuine transactions"):
        score(run, "--data.split", "train", "--output", tmp_path / "out")


def test_known_labels_of_one_kind_or_of_a_part_are_warned_of(run, files, tmp_path):
    table = pq.read_table(files / "later.parquet")
    fraud = table["TX_FRAUD"].to_numpy()
    place, alone = table.column_names.index("TX_FRAUD"), pa.array(fraud, mask=fraud == 0)
    pq.write_table(table.set_column(place, "TX_FRAUD", alone), tmp_path / "frauds.parquet")
    assert score(run, "--data.path", tmp_path / "frauds.parquet", "--reasons", 0, "--output", tmp_path / "out") == 0
    told = metrics(tmp_path / "out")["warnings"]
    frauds = int((fraud == 1).sum())
    assert any(f"{frauds} of {frauds} known labels are fraud" in line for line in told)
    assert any(f"{frauds} of {len(fraud)} labels are known" in line for line in told)
    assert "undefined" in Structure((tmp_path / "out/index.html").read_text("utf-8")).text


def test_drift_of_a_later_period_is_found(run, later, files, tmp_path, capsys):
    assert dispatch(["monitor", str(run / "eval"), str(run / "eval")]) == 0
    words = ("--data.path", files / "drifted.parquet", "--reasons", 0, "--output", tmp_path / "drifted")
    assert score(run, *words) == 0
    capsys.readouterr()
    told = tmp_path / "drift.json"
    assert dispatch(["monitor", str(later), str(tmp_path / "drifted"), "--output", str(told)]) == 3
    found = json.loads(told.read_text())
    assert "amount" in found["drifted"] and "weekend" not in found["drifted"]
    out = capsys.readouterr().out
    assert "drifted (PSI from 0.2 or KS from 0.15): " in out and "following threshold" in out
    before, after = (
        next(x for x in found["columns"] if x["name"] == "amount")[key] for key in ("median_before", "median_after")
    )
    assert after == pytest.approx(4 * before, rel=0.01)


def test_a_checkpoint_says_what_its_validation_looked_like(run, later, tmp_path):
    told = tmp_path / "drift.json"
    assert dispatch(["monitor", str(run), str(later), "--output", str(told)]) == 3  # its dozen alerts and few days
    found, validation = json.loads(told.read_text()), Finance(find_checkpoint(run).config()).source("val")
    amounts = validation.table.amount[validation.rows]
    amount = next(x for x in found["columns"] if x["name"] == "amount")
    assert amount["median_before"] == pytest.approx(np.median(amounts), rel=1e-3)
    later_amounts = pq.read_table(later / "scores.parquet")["feature.amount"].to_numpy()
    assert amount["ks"] == pytest.approx(scipy.stats.ks_2samp(amounts, later_amounts).statistic, abs=0.02)
    days = np.ptp(validation.table.seconds[validation.rows] // DAY) + 1
    assert found["threshold"]["alert_share_before"] == pytest.approx(3 * days / len(amounts))


def test_results_that_cannot_be_compared_are_refused(run, later, tmp_path):
    with pytest.raises(UserError, match=r"has no snapshot\.json: name a folder"):
        dispatch(["monitor", str(tmp_path), str(later)])
    other = tmp_path / "other"
    other.mkdir()
    for name in ("scores.parquet", "snapshot.json"):
        (other / name).write_bytes((later / name).read_bytes())
    changed = metrics(later)
    changed["provenance"]["checkpoint"]["sha256"] = "0" * 64
    (other / "metrics.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="different checkpoints"):
        dispatch(["monitor", str(later), str(other)])


def test_alerts_belong_to_the_finance_task_alone():
    with pytest.raises(UserError, match="--alerts-per-day 5: the medical task raises no alerts"):
        scoring_task(Config(), EvalArguments(checkpoint="x", alerts_per_day=5.0))


def test_the_history_of_a_later_file_is_all_that_came_before_it(tmp_path, capsys):
    paths = {name: str(tmp_path / name) for name in "abc"}
    for name in "abc":
        Path(paths[name]).touch()

    def history(trained, earlier, later):
        finance = FinanceConfig(history=tuple(paths[name] for name in earlier))
        config = Config(data=DataConfig(path=trained), task=TaskConfig(name="finance", finance=finance))
        asked = EvalArguments(checkpoint="x", data=EvalData(path=paths[later]))
        return scoring_task(config, asked).finance.history

    assert history(paths["b"], "a", "c") == (paths["a"], paths["b"])
    assert history(paths["b"], "a", "b") == (paths["a"],)
    assert history(paths["b"], "a", "a") == ()
    assert capsys.readouterr().err == ""
    assert history(None, "", "c") == ()
    assert "trained on generated data: the first of" in capsys.readouterr().err
    Path(paths["a"]).unlink()
    assert history(paths["b"], "a", "c") == (paths["b"],)
    assert f"begins with {paths['b']}" in capsys.readouterr().err
    Path(paths["b"]).unlink()
    assert history(paths["b"], "a", "c") == ()
    assert "have no history" in capsys.readouterr().err
