"""The records task: parts, what each mode shows, loss, and figures against scikit-learn."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, log_loss, roc_auc_score, roc_curve

from r1jax.config import Config, DataConfig, ModelConfig, TaskConfig
from r1jax.data.records import RecordCases, Records
from r1jax.errors import UserError
from r1jax.models.r1 import Inputs, Output
from r1jax.ops.losses import hinge_probabilities, squared_hinge
from r1jax.tasks.records.figures import record_figures, statistics
from r1jax.tasks.records.task import MODES, RecordsTask
from r1jax.tasks.task import Task
from r1jax.validation import validate
from tests.data.record_sets import write_credit, write_phrases, write_stocks


def made(kind, path, *modalities, **task):
    return RecordsTask(
        Config(
            model=ModelConfig(modalities=modalities, text_tokens=24),
            task=TaskConfig(name="records", records=kind, label_smoothing=0.0, **task),
            data=DataConfig(path=str(path)),
        )
    )


@pytest.fixture(scope="module")
def stocks(tmp_path_factory):
    return made("stocks", write_stocks(tmp_path_factory.mktemp("stocks") / "set"), "series", "table", "text")


@pytest.fixture(scope="module")
def credit(tmp_path_factory):
    return made("credit", write_credit(tmp_path_factory.mktemp("credit") / "x.parquet"), "series", "table")


def test_it_is_a_task(stocks, credit):
    assert isinstance(stocks, Task) and tuple(stocks.modes()) == ("both", "numbers", "text")
    assert tuple(credit.modes()) == ("both",) and credit.heads == (("class", 2),)


def test_parts_are_folds_or_periods(stocks, credit):
    rows = {split: set(credit.source(split).rows) for split in ("train", "val", "all")}
    assert rows["train"] | rows["val"] == rows["all"] and not rows["train"] & rows["val"] and len(rows["val"]) == 16
    other = RecordsTask(replace(credit.config, data=replace(credit.config.data, fold=1)))
    assert not rows["val"] & set(other.source("val").rows)
    with pytest.raises(UserError, match="has no test part, only folds"):
        credit.source("test")
    days = {split: stocks.source(split).records.day[stocks.source(split).rows] for split in ("train", "val", "test")}
    assert days["train"].max() < days["val"].min() and days["val"].max() < days["test"].min()
    assert sum(map(len, days.values())) == len(stocks.source("all"))
    earlier = RecordsTask(replace(stocks.config, data=replace(stocks.config.data, fold=3)))
    days = {split: earlier.source(split).records.day[earlier.source(split).rows] for split in ("train", "val")}
    june, august = (int(np.datetime64(day).astype(int)) for day in ("2015-06-01", "2015-08-01"))
    assert days["train"].max() < june <= days["val"].min() and days["val"].max() < august
    with pytest.raises(UserError, match="data.fold is 4, but it must be below 4 for stocks, an earlier period"):
        RecordsTask(replace(stocks.config, data=replace(stocks.config.data, fold=4)))


def test_what_the_records_lack_is_refused(tmp_path):
    path = write_phrases(tmp_path / "x.txt")
    with pytest.raises(UserError, match="model.modalities has 'table', which sentiment records lack: they have text"):
        made("sentiment", path, "table", "text").source("train")
    with pytest.raises(UserError, match="data.path is None, but it must be a file or folder"):
        validate(Config(model=ModelConfig(modalities=("table",)), task=TaskConfig(name="records")))
    with pytest.raises(UserError, match="model.text_ngrams is 8, but it must be 0 for the language task"):
        validate(Config(model=ModelConfig(modalities=("text",), text_ngrams=8), task=TaskConfig(name="language")))
    with pytest.raises(UserError, match="model.text_merge is 8, but it must be 1 where text is learned byte by byte"):
        validate(Config(model=ModelConfig(modalities=("text",), text_merge=8), task=TaskConfig(name="language")))
    with pytest.raises(UserError, match="data.mix"):
        mixed = DataConfig(path="a", mix=("b",), weights=(1, 1))
        validate(Config(model=ModelConfig(modalities=("table",)), task=TaskConfig(name="records"), data=mixed))


def test_cut_texts_and_classes_are_told(tmp_path):
    task = made("sentiment", write_phrases(tmp_path / "x.txt"), "text")
    counts, cut = task.remarks(task.source("train"))
    assert "negative" in counts and "neutral" in counts and cut.startswith("warning: 48 of 48 texts are longer than 23")
    records = Records(["a", "b"], np.zeros(2, np.int32), text=["x" * 23, "x" * 24])
    two = RecordCases("two", records, np.arange(2))
    assert task.text_warnings(two) == ["1 of 2 texts are longer than 23 bytes, and their ends are not read"]
    read = task.collate(two.read_batch(np.arange(2)))["text"]
    np.testing.assert_array_equal(read[0], read[1])


def test_what_lies_beside_is_learned_from_and_never_judged(tmp_path):
    lines = write_phrases(tmp_path / "x.txt").read_text("utf-8").splitlines(keepends=True)
    path = tmp_path / "Sentences_AllAgree.txt"
    path.write_text("".join(lines[:40]), "utf-8")
    (tmp_path / "Sentences_66Agree.txt").write_text("".join(lines), "utf-8")
    alone, agreed = made("sentiment", path, "text"), made("sentiment", path, "text", agreement=True)
    for split in ("val", "all"):
        np.testing.assert_array_equal(agreed.source(split).rows, alone.source(split).rows)
    learned = agreed.source("train").rows
    np.testing.assert_array_equal(learned[learned < 40], alone.source("train").rows)
    np.testing.assert_array_equal(learned[learned >= 40], np.arange(40, 60))
    assert agreed.remarks(agreed.source("train"))[1] == (
        "note: 20 of them come from other files of the folder; annotators disagreed on 20"
    )
    batch = agreed.collate(agreed.source("train").read_batch(np.arange(4)))
    _, targets = agreed.prepare(jax.tree.map(jnp.asarray, batch))
    np.testing.assert_array_equal(targets["agreed"], np.ones(4))
    lone = made("sentiment", tmp_path / "x.txt", "text", agreement=True)
    assert "data.path is no Sentences_*Agree.txt with others beside it" in lone.remarks(lone.source("train"))[1]


def test_annotators_that_disagreed_soften_a_label(tmp_path):
    task = made("sentiment", tmp_path / "x.txt", "text", agreement=True)
    logits = np.random.default_rng(0).standard_normal((3, 3))
    label, agreed = np.array([0, 2, 1]), np.array([1.0, 0.58, 0.875])
    target = np.where(np.eye(3)[label] == 1, agreed[:, None], (1 - agreed[:, None]) / 2)
    expected = -(target * np.log(np.asarray(jax.nn.softmax(logits)))).sum(axis=1).mean()
    targets = {"class": jnp.asarray(label, jnp.int32), "agreed": jnp.asarray(agreed, jnp.float32)}
    output = Output({"class": jnp.asarray(logits, jnp.float32)}, (), None, None, None, None)
    found, _ = task.loss(output, Inputs(), targets, jnp.float32(0))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    with pytest.raises(UserError, match="task.agreement is True, but it must be False: only sentences have files"):
        validate(replace(task.config, task=replace(task.config.task, records="credit")))


def test_squared_hinges_are_learned_and_their_scores_are_probabilities(tmp_path):
    task = made("sentiment", tmp_path / "x.txt", "text", agreement=True, loss="squared_hinge")
    scores = np.array([[0.5, -2.0, 0.2], [-1.5, 0.0, 1.5], [-3.0, -3.0, -3.0]], np.float32)
    label, agreed = np.array([0, 2, 1]), np.array([1.0, 0.58, 0.875])
    hinges = np.maximum(1 - np.where(np.eye(3)[label] == 1, 1, -1) * scores, 0) ** 2
    targets = {"class": jnp.asarray(label, jnp.int32), "agreed": jnp.asarray(agreed, jnp.float32)}
    output = Output({"class": jnp.asarray(scores)}, (), None, None, None, None)
    found, _ = task.loss(output, Inputs(), targets, jnp.float32(0))
    np.testing.assert_allclose(found, (hinges.sum(axis=1) * [1.0, 0.16, 0.75]).mean(), rtol=1e-6)
    batch = {
        "target.class": targets["class"],
        "text": jnp.zeros((3, 2), jnp.int32),
        "text_valid": jnp.ones((3, 2), bool),
    }
    told = task.outcomes(lambda _: output, batch, jax.tree.map(jnp.asarray, MODES["both"]))["class"]
    np.testing.assert_allclose(told[0], np.array([0.75, 0.02, 0.6]) / 1.37, rtol=1e-5)
    np.testing.assert_allclose(told[1:], [[0.02 / 1.52, 0.5 / 1.52, 1 / 1.52], [1 / 3] * 3], rtol=1e-5)
    with pytest.raises(UserError, match="task.label_smoothing is 0.02, but it must be 0 with task.loss squared_hinge"):
        validate(replace(task.config, task=replace(task.config.task, label_smoothing=0.02)))
    with pytest.raises(UserError, match="task.loss is 'squared_hinge', but it must be cross_entropy: the finance task"):
        validate(Config(task=TaskConfig(name="finance", loss="squared_hinge")))


def test_a_score_of_twice_the_share_less_one_has_the_least_squared_hinge():
    share = np.array([0.7, 0.2, 0.1], np.float32)

    def expected(scores):
        return sum(p * squared_hinge(scores, jnp.asarray(i)) for i, p in enumerate(share))

    best = jnp.asarray(2 * share - 1)
    np.testing.assert_allclose(jax.grad(expected)(best), 0, atol=1e-6)
    np.testing.assert_allclose(hinge_probabilities(best), share, rtol=1e-6)


def test_modes_hide_numbers_or_text(stocks):
    batch = jax.tree.map(jnp.asarray, stocks.collate(stocks.source("val").read_batch(np.arange(6))))
    seen = {}
    for name, mode in MODES.items():

        def read(inputs, name=name):
            seen[name] = inputs
            return Output({"class": jnp.log(jnp.array([[0.5, 0.2, 0.3]] * 6))}, (), None, None, None, None)

        found = stocks.outcomes(read, batch, jax.tree.map(jnp.asarray, mode))
        np.testing.assert_allclose(found["class"], [[0.8, 0.2]] * 6, rtol=1e-5)  # a large gain is no loss
    absent = {name: np.isnan(inputs.table) for name, inputs in seen.items()}
    assert not absent["both"].any() and absent["text"][:, :-8].all() and not absent["text"][:, -8:].any()
    assert absent["numbers"][:, -8:].all() and not absent["numbers"][:, :-8].any()
    assert all(inputs.has_table.all() for inputs in seen.values())
    assert seen["numbers"].has_series.all() and not seen["text"].has_series.any()
    assert not seen["numbers"].text_valid.any()
    np.testing.assert_array_equal(seen["text"].text_valid, seen["both"].text_valid)
    assert seen["both"].series.shape == (6, 1, 20, 4) and seen["both"].series_valid.all()


def test_training_hides_each_kind_of_some_cases(stocks):
    batch = jax.tree.map(jnp.asarray, stocks.collate(stocks.source("train").read_batch(np.arange(200))))
    inputs, _ = stocks.prepare(batch, jax.random.split(jax.random.key(0), 200))
    hidden, had = np.isnan(inputs.table[:, 0]), np.asarray(batch["text_valid"]).any(axis=1)
    silenced = had & ~np.asarray(inputs.text_valid).any(axis=1)
    assert 30 < hidden.sum() < 70 and silenced.sum() > 0.1 * had.sum() and not (hidden & silenced).any()


def test_loss_is_the_cross_entropy_of_known_labels_and_parts_add_up(credit):
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((6, 2)), jnp.float32)
    label = jnp.asarray([0, 1, -1, 1, 0, -1], jnp.int32)

    def loss(rows, weights=None):
        output = Output({"class": logits[rows]}, (), None, None, None, None)
        return credit.loss(output, Inputs(), {"class": label[rows]}, jnp.float32(0), weights)[0]

    known = np.array([0, 1, 3, 4])
    expected = log_loss(np.asarray(label)[known], jax.nn.softmax(logits)[known])
    np.testing.assert_allclose(loss(slice(0, 6)), expected, rtol=1e-6)
    weights = credit.weights(Inputs(), {"class": label})
    np.testing.assert_allclose(loss(slice(0, 2), weights) + loss(slice(2, 6), weights), expected, rtol=1e-6)


def test_stocks_learn_large_gains_apart_from_the_quiet_days(stocks):
    batch = stocks.collate(stocks.source("val").read_batch(np.arange(40)))
    inputs, targets = stocks.prepare(jax.tree.map(jnp.asarray, batch))
    outcome, label = np.asarray(targets["outcome"]), np.asarray(targets["class"])
    assert set(outcome) == {0, 1, 2} and (label == (outcome == 1)).all() and stocks.heads == (("class", 3),)
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((40, 3)), jnp.float32)
    found = stocks.loss(Output({"class": logits}, (), None, None, None, None), inputs, targets, jnp.float32(0))[0]
    np.testing.assert_allclose(found, log_loss(outcome, jax.nn.softmax(logits)), rtol=1e-6)


def test_figures_of_two_classes_are_scikit_learns():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 60)
    risk = np.round(np.clip(0.3 * label + 0.7 * rng.random(60), 0, 1), 1)
    p = np.stack([1 - risk, risk], axis=1)
    found = record_figures(np.append(label, -1), np.append(p, [[0.1, 0.9]], axis=0))
    called = p.argmax(axis=1)
    assert found["accuracy"] == pytest.approx(accuracy_score(label, called))
    assert found["macro_f1"] == pytest.approx(f1_score(label, called, average="macro"))
    assert found["auroc"] == pytest.approx(roc_auc_score(label, risk))
    assert found["auprc"] == pytest.approx(average_precision_score(label, risk))
    fpr, tpr, _ = roc_curve(label, risk, drop_intermediate=False)
    assert found["ks"] == pytest.approx((tpr - fpr).max())
    assert found["brier"] == pytest.approx(((risk - label) ** 2).mean())


def test_figures_of_three_classes_and_of_weighted_cases():
    rng = np.random.default_rng(1)
    label = rng.integers(0, 3, 50)
    p = rng.dirichlet(np.ones(3), 50)
    weights = rng.integers(0, 3, (2, 50)).astype(float)
    found = statistics(label, p)(weights)
    for row, weight in enumerate(weights):
        f1 = f1_score(label, p.argmax(axis=1), average="macro", sample_weight=weight)
        assert found["macro_f1"][row] == pytest.approx(f1)
        assert found["cross_entropy"][row] == pytest.approx(log_loss(label, p, sample_weight=weight))
    assert set(found) == {"accuracy", "macro_f1", "cross_entropy"}
    assert record_figures(np.full(3, -1), p[:3]) == {}
