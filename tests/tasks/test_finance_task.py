"""The finance task: periods, what is kept and corrected for, what each mode shows, loss and figures."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from sklearn.metrics import average_precision_score, roc_auc_score

from r1jax.config import Config, DataConfig, FinanceConfig, ModelConfig, TaskConfig
from r1jax.data.transaction_cases import training_rows
from r1jax.data.transaction_history import CHANNELS, FEATURES
from r1jax.data.transactions import DAY
from r1jax.errors import UserError
from r1jax.models.r1 import Output
from r1jax.tasks.finance.batch import scale_events, scale_features
from r1jax.tasks.finance.figures import fraud_figures
from r1jax.tasks.finance.periods import period_rows
from r1jax.tasks.finance.task import MODES, Finance
from r1jax.tasks.task import Task
from tests.data.streams import draw_table

FINANCE = FinanceConfig(events=4, negatives_kept=0.2, simulated_customers=60, simulated_days=80)
CONFIG = Config(
    model=ModelConfig(modalities=("series", "table", "text"), text_tokens=24),
    task=TaskConfig(name="finance", label_smoothing=0.0, finance=FINANCE),
)


@pytest.fixture(scope="module")
def task():
    return Finance(CONFIG)


@pytest.fixture(scope="module")
def batch(task):
    source = task.source("val")
    return jax.tree.map(jnp.asarray, task.collate(source.read_batch(np.arange(32))))


def mode_of(name):
    return jax.tree.map(jnp.asarray, MODES[name])


def output_of(logits):
    return Output({"fraud": logits[:, None]}, (), None, None, None, None)


def test_it_is_a_task(task):
    assert isinstance(task, Task) and tuple(task.modes()) == ("both", "transactions", "text")
    numbers = replace(CONFIG, model=replace(CONFIG.model, modalities=("series",)))
    assert tuple(Finance(numbers).modes()) == ("both",)


def test_parts_are_periods_one_after_another_and_labels_of_training_are_known_when_validation_begins(task):
    parts = {split: task.source(split) for split in ("train", "val", "test", "all")}
    seconds = {split: part.table.seconds[part.rows] for split, part in parts.items()}
    assert seconds["train"].max() + 7 * DAY <= seconds["val"].min()
    assert seconds["val"].max() < seconds["test"].min() and seconds["test"].max() == seconds["all"].max()
    assert len(seconds["all"]) == len(parts["all"].table)
    assert len({part.fingerprint for part in parts.values()}) == 4
    assert all("generated, no person" in part.name for part in parts.values())


def test_named_periods_take_whole_days():
    seconds = np.arange(0, 10 * DAY, DAY // 2)
    rows = period_rows(seconds, "val", replace(FINANCE, val=("1970-01-03", "1970-01-05")))
    np.testing.assert_array_equal(seconds[rows] // DAY, [2, 2, 3, 3])
    zoned = replace(FINANCE, val=("1970-01-03T00:00:00+12:00", "1970-01-05"))
    np.testing.assert_array_equal(seconds[period_rows(seconds, "val", zoned)][0], 2 * DAY - DAY // 2)


@pytest.mark.parametrize(
    ("days", "message"),
    [
        (("1970-01-03",), "must be two days"),
        (("soon", "later"), "must be two days"),
        (("1970-01-03", "1970-01-03"), "the second day must be later"),
        (("1970-01-09", "1970-01-03"), "the second day must be later"),
        (
            ("1980-01-01", "1980-01-02"),
            "from 1980-01-01 to before 1980-01-02: the data covers 1970-01-01 to 1970-01-10",
        ),
    ],
)
def test_periods_that_cannot_be_are_refused(days, message):
    with pytest.raises(UserError, match=message):
        period_rows(np.arange(0, 10 * DAY, DAY // 2), "test", replace(FINANCE, test=days))


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (
            {"train": ("1970-01-02", "1970-01-06"), "val": ("1970-01-05", "1970-01-07")},
            r"train \(named\).*val \(named\)",
        ),
        ({"val": ("1970-01-09", "1970-01-11")}, r"val \(named\) ends before 1970-01-11.*test \(chosen by shares\)"),
        ({"test": ("1970-01-02", "1970-01-04")}, r"val \(chosen by shares\).*test \(named\) begins on 1970-01-02"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_periods_that_overlap_are_refused(split, named, message):
    config = replace(FINANCE, label_delay_days=0.5, **named)
    with pytest.raises(UserError, match=message):
        period_rows(np.arange(0, 10 * DAY, DAY // 2), split, config)


def test_a_period_that_the_label_delay_swallows_is_refused():
    with pytest.raises(UserError, match="no transaction is in the train period"):
        period_rows(np.arange(0, 10 * DAY, DAY // 2), "train", FINANCE)  # 3 to 8 days, less 7


def test_training_keeps_every_fraud_and_a_fixed_share_of_the_rest():
    table, rows = draw_table(rows=20000, entities=50), np.arange(1000, 20000)
    kept = training_rows(table, rows, 0.2, seed=1)
    fraud = table.fraud[rows]
    np.testing.assert_array_equal(kept[table.fraud[kept] == 1], rows[fraud == 1])
    assert not np.isnan(table.fraud[kept]).any()
    assert abs((table.fraud[kept] == 0).sum() / (fraud == 0).sum() - 0.2) < 0.02
    np.testing.assert_array_equal(kept, training_rows(table, rows, 0.2, seed=1))
    inner = training_rows(table, rows[500:], 0.2, seed=1)
    np.testing.assert_array_equal(inner, kept[kept >= rows[500]])


def test_probabilities_are_corrected_for_the_genuine_payments_left_out(task, batch):
    logits = jnp.linspace(-6, 6, 32)
    found = task.outcomes(lambda inputs: output_of(logits), batch, mode_of("both"))["fraud"]
    s = 1 / (1 + np.exp(-np.asarray(logits, float)))
    np.testing.assert_allclose(found, s / (s + (1 - s) / 0.2), rtol=1e-5)


def test_a_mode_shows_its_part_alone(task, batch):
    for mode, numbers, notes in (("both", True, True), ("transactions", True, False), ("text", False, True)):
        seen = []
        task.outcomes(lambda inputs, seen=seen: seen.append(inputs) or output_of(jnp.zeros(32)), batch, mode_of(mode))
        assert bool(seen[0].has_series.all()) == bool(seen[0].has_table.all()) == numbers, mode
        assert bool(seen[0].text_valid.any()) == notes, mode


def test_training_hides_either_part_of_some_cases(batch):
    task = Finance(replace(CONFIG, task=replace(CONFIG.task, modality_dropout=0.3)))
    many = jax.tree.map(lambda x: jnp.repeat(x, 30, axis=0), batch)
    keys = jax.random.split(jax.random.key(0), 960)
    inputs, _ = jax.jit(task.prepare)(many, keys)
    noted, shown = many["text_valid"].any(axis=1), inputs.text_valid.any(axis=1)
    np.testing.assert_array_equal(inputs.has_series, inputs.has_table)
    assert abs(float(jnp.mean(~inputs.has_series)) - 0.3) < 0.05
    assert abs(float(jnp.mean(~shown[noted])) - 0.3) < 0.1
    assert not bool((noted & ~shown & ~inputs.has_series).any())


def test_the_loss_is_cross_entropy_of_the_known_labels_and_its_parts_add_up(task, batch):
    rng = np.random.default_rng(0)
    logits, fraud = rng.standard_normal(32).astype(np.float32), (rng.random(32) < 0.4).astype(np.float32)
    fraud[::5] = np.nan
    inputs, _ = task.prepare(batch)
    targets = {"fraud": jnp.asarray(fraud)}
    known = ~np.isnan(fraud)
    total, parts = task.loss(output_of(jnp.asarray(logits)), inputs, targets, jnp.zeros(()))
    p = 1 / (1 + np.exp(-logits[known].astype(float)))
    want = -np.mean(np.where(fraud[known] == 1, np.log(p), np.log(1 - p)))
    np.testing.assert_allclose(total, want, rtol=1e-5)
    whole, halves = task.weights(inputs, targets), 0.0
    for half in (slice(0, 16), slice(16, 32)):
        cut = jax.tree.map(lambda x, half=half: x[half], (inputs, targets))
        halves += task.loss(output_of(jnp.asarray(logits[half])), *cut, jnp.zeros(()), whole)[0]
    np.testing.assert_allclose(halves, total, rtol=1e-6)


def test_figures_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    fraud = (rng.random(5000) < 0.05).astype(np.float32)
    score = rng.standard_normal(5000) + 2 * fraud
    found = fraud_figures(np.append(fraud, np.nan).astype(np.float32), np.append(score, 9.0))
    assert found["auprc"] == pytest.approx(average_precision_score(fraud, score))
    assert found["auroc"] == pytest.approx(roc_auc_score(fraud, score))
    genuine = np.sort(score[fraud == 0])[::-1]
    allowed = int(0.003 * len(genuine))
    assert found["recall_fpr_0.3"] == pytest.approx((score[fraud == 1] > genuine[allowed]).mean())
    assert fraud_figures(np.zeros(4, np.float32), np.arange(4.0)) == {}


def test_the_closing_table_puts_modes_and_ceilings_side_by_side(task):
    source = task.source("val")
    fraud = source.table.fraud[source.rows]
    figures = {mode: task.figures({"fraud": fraud + 0.0}, {"fraud": fraud}) for mode in task.modes()}
    told = task.closing(figures, source, 100)
    assert "transactions only" in told and "attainable recall" in told and "1.000" in told
    assert task.score(figures["both"]) == 1.0 and task.score({}) is None


def test_numbers_are_brought_to_the_range_of_the_encoders(task):
    source = task.source("test")
    raw = source.read_batch(np.arange(len(source)))
    events = np.asarray(scale_events(jnp.asarray(raw["series"])))[raw["series_valid"]]
    assert np.isfinite(events).all() and np.abs(np.quantile(events, [0.01, 0.99], axis=0)).max() < 5
    age = np.zeros((1, 1, 1, len(CHANNELS)), np.float32)
    age[..., -1] = 28 * DAY
    assert scale_events(jnp.asarray(age))[0, 0, 0, -1] == pytest.approx(-0.2)
    table = np.asarray(scale_features(jnp.asarray(raw["table"])))
    assert np.abs(table).max() < 6 and table.shape[1] == len(FEATURES)
    x = dict(zip(FEATURES, raw["table"].T.astype(np.float64), strict=True))
    expected = {name: np.log1p(x[name]) - 3.5 for name in ("amount", "customer_mean_7d", "customer_usual")}
    expected |= {name: np.log1p(x[name]) - 2 for name in ("terminal_count_30d", "customer_genuine_count")}
    expected |= {"customer_ratio_high": 2 * np.log1p(x["customer_ratio_high"]) - 1.4}
    expected |= {"terminal_fraud_last_days": x["terminal_fraud_last_days"] / 10 - 2}
    expected |= {name: 2 * x[name] for name in ("weekend", "terminal_risk_1d")}
    for name, column in expected.items():
        np.testing.assert_allclose(table[:, FEATURES.index(name)], column, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.fixture
def folder(tmp_path):
    """A stream in two files."""
    table = draw_table(rows=400, entities=6, unknown=0.0)
    stream = pa.table(
        {
            "TRANSACTION_ID": table.ids,
            "TX_DATETIME": pa.array(table.seconds).cast(pa.timestamp("s")),
            "CUSTOMER_ID": table.customer,
            "TERMINAL_ID": table.terminal,
            "TX_AMOUNT": table.amount,
            "TX_FRAUD": table.fraud,
        }
    )
    parts = {"a": stream.slice(0, 200), "b": stream.slice(200, 100), "c": stream.slice(300)}
    for name, part in ({"all": stream} | parts).items():
        parquet.write_table(part, tmp_path / f"{name}.parquet")
    return tmp_path


def with_path(folder, name, **finance):
    return Finance(
        replace(
            CONFIG,
            data=DataConfig(path=str(folder / f"{name}.parquet")),
            task=replace(CONFIG.task, finance=replace(FINANCE, **finance)),
        )
    )


def test_a_later_file_is_scored_with_the_earlier_ones_as_its_history(folder):
    whole = with_path(folder, "all").source("all").read_batch(np.arange(300, 400))
    later = with_path(folder, "c", history=tuple(str(folder / f"{name}.parquet") for name in "ab")).source("all")
    assert len(later) == 100
    found = later.read_batch(np.arange(100))
    assert found["case_id"] == whole["case_id"]
    for name in ("series", "series_state", "series_valid", "table", "target.fraud"):
        np.testing.assert_array_equal(found[name], whole[name])


def test_a_period_without_fraud_is_refused_before_training(folder):
    task = with_path(folder, "all")
    source = task.source("train")
    assert task.remarks(source)[0].startswith("note: ")
    source.table.fraud[:] = 0
    with pytest.raises(UserError, match="has 0 frauds among .* choose another period by --task.finance.train"):
        task.remarks(source)


def test_what_is_lost_of_the_notes_is_said(task, folder):
    source, most = task.source("train"), CONFIG.model.text_tokens - 1
    notes = source.read_batch(np.arange(len(source)))["text"]
    cut = sum(len(note.encode()) > most for note in notes)
    assert cut > 0
    said = f"warning: {cut} of {len(notes)} notes are longer than {most} bytes, and their ends are not read"
    assert task.remarks(source)[1:] == [said]
    long = Finance(replace(CONFIG, model=replace(CONFIG.model, text_tokens=500)))
    assert long.note_warnings(source) == []
    without = with_path(folder, "all")
    assert "none of these transactions has one" in without.note_warnings(without.source("all"))[0]
    numbers = Finance(replace(CONFIG, model=replace(CONFIG.model, modalities=("series", "table"))))
    assert numbers.note_warnings(without.source("all")) == []
