"""Reasons on a small model of streams, table and notes: nothing is lost, and what is not there adds nothing."""

from unittest import mock

import jax
import numpy as np
import pytest

from r1jax.config import Config, DecoderConfig, FinanceConfig, ModelConfig, SeriesConfig, TableConfig, TaskConfig
from r1jax.data.transaction_history import FEATURES
from r1jax.models.ngrams import NgramScores
from r1jax.models.r1 import R1
from r1jax.parallel.mesh import make_mesh
from r1jax.serve import explain as module
from r1jax.serve.explain import Explainer, explain
from r1jax.tasks.finance.batch import EVENT_FEATURES
from r1jax.tasks.finance.reasons import by_concept
from r1jax.tasks.finance.task import Finance

CONFIG = Config(
    model=ModelConfig(
        modalities=("series", "table", "text"),
        decoder=DecoderConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            moe_intermediate_size=8,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=1,
            first_k_dense_replace=0,
            num_nextn_predict_layers=0,
        ),
        remat="full",
        series=SeriesConfig(layers=0, bins=4, tokens=1, num_attention_heads=2),
        table=TableConfig(layers=0),
        text_tokens=16,
        text_ngrams=64,
    ),
    task=TaskConfig(
        name="finance", finance=FinanceConfig(events=6, negatives_kept=0.25, simulated_customers=20, simulated_days=40)
    ),
)
CHOSEN = np.array([3, 70, 5])


@pytest.fixture(scope="module")
def explained():
    task = Finance(CONFIG)
    source, model = task.source("test"), R1(CONFIG.model, task.heads)
    inputs, _ = task.prepare(jax.tree.map(jax.numpy.asarray, task.collate(source.read_batch(np.arange(2)))))
    params = jax.jit(lambda key: model.init(key, inputs)["params"])(jax.random.key(0))
    params = jax.tree.map(lambda x: 2 * x, params)  # weights large enough to matter
    rng = np.random.default_rng(0)
    for part, name in (("head_fraud", "weight"), ("ngrams", "embed_tokens")):  # which begin at 0
        params[part][name] = jax.numpy.asarray(rng.standard_normal(params[part][name].shape), jax.numpy.float32)
    mesh, typical = make_mesh(CONFIG.mesh), np.arange(8, 46)
    made = {}

    def compiled(model, task, weights, steps):
        """One for each number of steps: weights are an argument of its programs."""
        made.setdefault(steps, Explainer(model, task, weights, steps)).params = weights
        return made[steps]

    def again(chosen, weights=params):
        with mock.patch.object(module, "Explainer", compiled), mock.patch.object(module, "BATCH", 8):
            return explain(model, task, mesh, weights, source, chosen, typical)

    return source, again, task, model, params


@pytest.fixture(scope="module")
def found(explained):
    return explained[1](CHOSEN)


def test_contributions_add_up_to_the_difference_from_a_typical_transaction(found):
    difference = found.output - found.baseline
    assert np.abs(difference).max() > 0.1
    np.testing.assert_allclose(found.residual, 0.0, atol=0.03 * np.abs(difference).max() + 2e-3)
    sums = by_concept(found, FEATURES, EVENT_FEATURES)
    np.testing.assert_allclose(sums.sum(axis=1) + found.residual, difference, atol=1e-5)


def test_the_output_is_the_log_odds_of_the_score(explained, found):
    source, _, task, model, params = explained
    batch = jax.tree.map(jax.numpy.asarray, task.collate(source.read_batch(CHOSEN)))
    mode = jax.tree.map(jax.numpy.asarray, task.modes()["both"])
    read = jax.jit(lambda inputs: model.apply({"params": params}, inputs))
    score = task.outcomes(read, batch, mode)["fraud"]
    np.testing.assert_allclose(1 / (1 + np.exp(-found.output)), score, rtol=1e-4)


def test_what_is_not_there_adds_nothing(explained, found):
    raw = explained[0].read_batch(CHOSEN)
    assert found.events.shape == (3, 2, 6, len(EVENT_FEATURES) + 1) and found.table.shape == (3, len(FEATURES))
    assert not found.events[~raw["series_valid"]].any()
    lengths = [min(len(note.encode()) + 2, 16) if note else 0 for note in raw["text"]]
    for row, length in enumerate(lengths):
        assert not found.text[row, length:].any()
    assert np.abs(found.events[raw["series_valid"]]).max() > 1e-4 and np.abs(found.table).max() > 1e-4


def test_what_ngrams_say_beyond_typical_notes_stands_at_the_beginning_of_the_note(explained, found, monkeypatch):
    source, again, task, _, params = explained
    monkeypatch.setattr(module, "FINER", 1)

    rows = np.concatenate([CHOSEN, np.arange(8, 40)])  # of the typical ones, whole batches
    batch = task.collate(source.read_batch(rows))
    text, valid = batch["text"], batch["text_valid"]
    scores = jax.jit(NgramScores(64, 1).apply)({"params": params["ngrams"]}, text, valid)
    own, typical = np.split(np.asarray(scores)[:, 0], [len(CHOSEN)])
    noted, there = np.split(valid.any(axis=1), [len(CHOSEN)])
    expected = np.where(noted, own - typical[there].mean(), 0)
    assert noted.any() and np.abs(expected).max() > 0.05
    silent = {**params, "ngrams": jax.tree.map(jax.numpy.zeros_like, params["ngrams"])}
    np.testing.assert_allclose(found.text[:, 0] - again(CHOSEN, silent).text[:, 0], expected, atol=1e-4)


def test_what_does_not_add_up_is_computed_in_finer_steps(explained, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 1)
    monkeypatch.setattr(module, "FINER", 1)
    rough = explained[1](CHOSEN)
    assert not rough.complete.all()
    monkeypatch.setattr(module, "FINER", 40)
    finer = explained[1](CHOSEN)
    assert np.abs(finer.residual).sum() < 0.3 * np.abs(rough.residual).sum()
    np.testing.assert_array_equal(finer.table[rough.complete], rough.table[rough.complete])


def test_reasons_of_a_transaction_do_not_depend_on_its_neighbours(explained, found):
    alone = explained[1](CHOSEN[1:2])
    np.testing.assert_allclose(alone.table[0], found.table[1], atol=1e-4)
    np.testing.assert_allclose(alone.output[0], found.output[1], atol=1e-5)
