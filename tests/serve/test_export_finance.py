"""`r1jax export` of a finance checkpoint: its scores, probabilities and bands leave, or nothing does."""

import json
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.data.pipeline import original
from r1jax.errors import UserError
from r1jax.serve import export_command, export_jax
from r1jax.serve.export_command import ExportArguments, Opened, export, open_checkpoint
from r1jax.serve.export_finance import FinanceExport, calibrated, first_score
from r1jax.serve.export_gate import FP32, HALF, compare
from r1jax.tasks.calibration import Isotonic, Platt
from r1jax.tasks.finance.task import Finance
from r1jax.train.checkpoint import Checkpoint
from r1jax.train.evaluation import Evaluator
from tests.serve.exported import export_to_jax
from tests.serve.exported_finance import get_config, write_checkpoint


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Opened:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("run") / "00000024")
    return open_checkpoint(checkpoint, ExportArguments(checkpoint=str(checkpoint.path), output="", cases=60))


@pytest.fixture(scope="module")
def folder(opened, tmp_path_factory) -> Path:
    return export_to_jax(tmp_path_factory.mktemp("exported"), opened)


@pytest.fixture(scope="module")
def run(folder):
    return export_jax.read_model(folder)


def test_the_program_gives_score_probability_and_band_of_the_checkpoint(opened, run):
    said = opened.exported
    assert said.shown == ("both", "transactions", "text")
    inputs = said.inputs(said.source.read_batch(np.arange(60)))
    bands = set()
    for shown in said.shown:
        found, scores = run(said.hidden(inputs, shown)), said.scores[shown]
        np.testing.assert_allclose(found["score"], scores, atol=1e-6)
        np.testing.assert_allclose(found["probability"], said.calibration(scores), atol=1e-4)
        np.testing.assert_array_equal(found["band"], said.policy.bands(scores, said.calibration(scores)))
        bands |= set(found["band"].tolist())
    assert len(bands) >= 3  # a program of one band would prove nothing
    assert np.ptp(said.scores["text"]) > 0.01 and np.abs(said.scores["both"] - said.scores["text"]).max() > 0.05


def test_the_card_says_what_a_host_must_bring(opened, folder):
    card = json.loads((folder / "card.json").read_text())
    assert card["task"] == "finance" and "human investigator" in card["notice"]
    assert card["trained_on"]["notice"] == "Trained on generated payments: no person, no bank."
    assert card["operating_points"] == {"both": opened.exported.policy._asdict()}
    assert card["history"] == {"events": 4, "label_delay_seconds": 7 * 86400}
    assert card["inputs"]["series"]["shape"] == [2, 4, 7] and card["inputs"]["text"]["shape"] == [23]
    assert card["outputs"]["band"] == {"shape": [], "dtype": "int32"}
    assert card["agreement"]["decisions"] == {"same": 180, "required": 180, "of": 180}


@pytest.mark.parametrize("wrong", ["score", "probability", "band"])
def test_a_model_that_says_something_else_does_not_agree(opened, run, wrong):
    def spoiled(inputs):
        found = run(inputs)
        changes = {"score": np.float32(2e-5), "probability": np.float32(2e-5), "band": np.eye(1, 256, dtype=int)[0]}
        return found | {wrong: found[wrong] + changes[wrong]}

    agreement = compare(spoiled, opened.exported, FP32)
    assert not agreement["agrees"]
    assert agreement["decisions"]["same"] == (177 if wrong == "band" else 180)
    over = {name for name, row in agreement["findings"].items() if row["largest_difference"] > row["limit"]}
    over -= {"probability"} if wrong == "score" else set()  # it is held to the score, which is another now
    assert over == ({wrong} if wrong != "band" else set())


def test_a_band_may_differ_only_beside_a_threshold(opened):
    said, rows = opened.exported, np.arange(60)
    scores, review = said.scores["both"].copy(), said.policy.review
    scores[0] = np.float32(review - 5e-4)
    found = {"score": scores, "probability": said.calibration(scores), "band": said._bands(scores.astype(np.float64))}
    found["band"][0] += 1
    said = FinanceExport.__new__(FinanceExport)
    said.__dict__ |= opened.exported.__dict__ | {"scores": {"both": scores}}
    for limits, same in ((FP32, 59), (HALF, 60)):
        assert said.held("both", {}, rows, found, limits)["score"].same.sum() == same


STEEP = float(np.float32(0.1250001))  # knots are scores, and those fp32
ISOTONIC = Isotonic((0.0, 0.125, STEEP, 0.5, 0.75), (0.01, 0.01, 0.4, 0.4, 0.9))


@pytest.mark.parametrize("calibration", [ISOTONIC, Isotonic((0.3,), (0.2,)), Platt(1.3, -0.4), Platt(0.0, -2.0)])
def test_calibration_in_the_graph_is_that_of_the_report(calibration):
    score = np.concatenate([np.linspace(0, 1, 101), [0.125, 0.12500005, STEEP, 1e-9, 1 - 1e-6]]).astype(np.float32)
    found = jax.jit(lambda x: calibrated(x, calibration))(jnp.asarray(score))
    np.testing.assert_allclose(found, calibration(score), atol=2e-6)


NINE_OF_TEN = Isotonic((0.25, 0.5), (0.1, 0.9))
"""Its upper level is the threshold of a block, which fp32 rounds down."""


@pytest.mark.parametrize("calibration", [NINE_OF_TEN, ISOTONIC, Platt(1.3, 0.4), Platt(0.0, -2.0), Platt(0.0, 3.0)])
def test_fp32_scores_are_in_the_bands_that_they_are_in_in_fp64(opened, calibration):
    for step_up, review in np.sort(np.random.default_rng(0).uniform(0, 1, (40, 2))).tolist():
        policy = opened.exported.policy._replace(step_up=step_up, review=review, block=0.9)
        edges = [first_score(band, calibration, policy) for band in (1, 2, 3)]
        near = np.clip([np.nextafter(np.float32(at), np.float32(to)) for at in edges for to in (0, at, 2)], 0, 1)
        for score in (*near, np.float32(0), np.float32(0.5), np.float32(1)):
            exact, probability = Fraction(float(score)), float(calibration(np.array([score]))[0])
            alert = exact >= Fraction(review)
            assert sum(score >= edge for edge in edges) == (exact >= step_up) + alert + (alert and probability >= 0.9)


def test_half_of_the_payments_that_are_compared_are_frauds_where_there_are_so_many():
    source = Finance(get_config()).source("all")
    cases = original(source)
    rows = FinanceExport.chosen(source, 20)
    fraud = cases.table.fraud[cases.rows[rows]]
    assert len(set(rows.tolist())) == 20 and fraud.sum() == 10
    assert rows[0] < 100 and rows[-1] > len(cases) - 100
    np.testing.assert_array_equal(FinanceExport.chosen(source, 10**9), np.arange(len(cases)))


def test_a_checkpoint_without_thresholds_is_refused(opened, monkeypatch):
    monkeypatch.setattr(Checkpoint, "meta", lambda self: {"validation": None})
    with pytest.raises(UserError, match="has no thresholds, as no validation had both fraud and genuine payments"):
        FinanceExport(opened.checkpoint, Evaluator.__new__(Evaluator), {}, opened.exported.source)


def test_another_task_is_refused(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(export_command, "EXPORTS", {"medical": None})
    with pytest.raises(UserError, match="is of the finance task: only checkpoints of medical are exported"):
        export([str(opened.checkpoint.path), "--output", str(tmp_path / "new")])
