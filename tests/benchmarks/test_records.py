"""The benchmark of records: gains are differences of figures, the table names them, and the peers learn."""

import numpy as np
import pytest

from benchmarks import records
from benchmarks.records_peers import boosted, stock_peers, svm
from r1jax.config import Config, DataConfig, ModelConfig, TaskConfig
from r1jax.tasks.records.task import RecordsTask
from tests.data.record_sets import write_credit, write_phrases, write_stocks


@pytest.fixture
def judged():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 90).astype(np.int32)
    scores = {}
    for name, noise in (("r1jax", 0.5), ("peer", 1.0)):
        risk = np.clip(label * 0.5 + noise * rng.random(90) * 0.5, 0, 1)
        scores[name] = np.stack([1 - risk, risk], axis=1)
    return records.Judged(label, np.arange(90) // 3, scores, [scores["peer"]], [])


def test_gains_are_differences_and_every_training_is_told(judged):
    found = records.figures(judged, 20)
    ours, peer = found["scorers"]["r1jax"], found["scorers"]["peer"]
    for name, gain in peer["gain"].items():
        assert gain["value"] == pytest.approx(ours["figures"][name]["value"] - peer["figures"][name]["value"])
        assert gain["low"] <= gain["value"] <= gain["high"]
    assert "gain" not in ours and found["seeds"][0]["auroc"] == pytest.approx(peer["figures"]["auroc"]["value"])
    text = records.table({"sets": {"stocknet": found | {"counts": {"other": 50, "loss": 40}, "runs": []}}})
    assert "| peer | " in text and f"auroc of each training alone: {found['seeds'][0]['auroc']:.3f}." in text


def parts(kind, path, *modalities, **asked):
    task = TaskConfig(name="records", records=kind, **asked)
    task = RecordsTask(Config(model=ModelConfig(modalities=modalities), task=task, data=DataConfig(path=str(path))))
    return task.source("train"), task.source("val")


def test_peers_give_a_probability_of_each_class(tmp_path):
    pytest.importorskip("lightgbm")
    train, val = parts("sentiment", write_phrases(tmp_path / "x.txt"), "text")
    (called,) = svm(train, val).values()
    np.testing.assert_array_equal(called.argmax(axis=1), val.records.label[val.rows])
    found = stock_peers(*parts("stocks", write_stocks(tmp_path / "set"), "table"))
    found |= boosted(*parts("credit", write_credit(tmp_path / "x.parquet"), "table"))
    assert len(found) == 5
    for probability in found.values():
        np.testing.assert_allclose(probability.sum(axis=1), 1, rtol=1e-6)


def test_a_peer_is_told_what_the_model_learns_from(tmp_path):
    lines = write_phrases(tmp_path / "x.txt").read_text("utf-8").splitlines(keepends=True)
    path = tmp_path / "Sentences_AllAgree.txt"
    path.write_text("".join(line for line in lines if "@negative" not in line), "utf-8")
    (tmp_path / "Sentences_66Agree.txt").write_text("".join(lines), "utf-8")
    train, _ = parts("sentiment", path, "text", agreement=True)
    _, judged = parts("sentiment", tmp_path / "x.txt", "text")
    found = {name: called.argmax(axis=1) for name, called in svm(train, judged).items()}
    assert list(found) == ["TF-IDF, linear SVM", "TF-IDF, linear SVM, by agreement"]
    label = judged.records.label[judged.rows]
    assert (label == 0).any() and not (found["TF-IDF, linear SVM"] == 0).any()
    np.testing.assert_array_equal(found["TF-IDF, linear SVM, by agreement"], label)
