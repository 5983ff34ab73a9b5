"""How rare n-grams are: against a count in plain Python, and where a fresh state has it."""

import math
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import Config, DataConfig, ModelConfig, TaskConfig, TrainConfig
from r1jax.models.ngrams import RARITY
from r1jax.ops.ngrams import ngrams_of
from r1jax.tasks.records.task import RecordsTask
from r1jax.train import rarity as rarity_module
from r1jax.train.layer_metrics import layer_metrics
from r1jax.train.optimizer import make_optimizer
from r1jax.train.rarity import rarity, with_known, with_rarity
from r1jax.train.step import TrainState
from tests.data.record_sets import write_phrases
from tests.train.experiment import optax_promotes

BUCKETS = 256
CONFIG = Config(
    model=ModelConfig(modalities=("text",), text_tokens=200, text_ngrams=BUCKETS),
    task=TaskConfig(name="records", records="sentiment"),
)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    path = write_phrases(tmp_path_factory.mktemp("phrases") / "x.txt")
    task = RecordsTask(replace(CONFIG, data=DataConfig(path=str(path))))
    return task, task.source("train")


def test_it_is_the_inverse_document_frequency_of_the_training_part(learned):
    task, source = learned
    texts = [source.records.text[row] for row in source.rows]
    counted = Counter(number for text in texts for number in ngrams_of(text, BUCKETS))
    assert 0 < len(counted) < BUCKETS and max(counted.values()) > 1
    expected = [math.log((1 + len(texts)) / (1 + counted[i])) + 1 if i in counted else 0 for i in range(BUCKETS)]
    np.testing.assert_allclose(rarity(task, source, BUCKETS), expected, rtol=1e-6)


def test_what_a_sample_of_the_texts_lacks_counts_as_the_rarest_and_is_not_silenced(learned, monkeypatch):
    task, source = learned
    monkeypatch.setattr(rarity_module, "MOST", 5)
    monkeypatch.setattr(rarity_module, "CHUNK", 2)
    rows = np.linspace(0, len(source) - 1, 5).astype(int)
    texts = [source.records.text[source.rows[row]] for row in rows]
    counted = Counter(number for text in texts for number in set(ngrams_of(text, BUCKETS)))
    assert len(source) > 5 and len(counted) < BUCKETS
    beats = []
    measured = rarity(task, source, BUCKETS, lambda: beats.append(1))
    np.testing.assert_allclose(measured, [math.log(6 / (1 + counted[i])) + 1 for i in range(BUCKETS)], rtol=1e-6)
    assert len(beats) == 3


def test_weights_of_another_run_stay_and_what_it_never_saw_can_be_learned(learned):
    task, source = learned
    params = {"ngrams": {RARITY: jnp.ones(BUCKETS)}}
    measured = with_rarity(TrainState(jnp.int32(0), jnp.zeros(4), params, {}, params), CONFIG, task, source)
    taken = 5 * (jnp.arange(BUCKETS) % 2).astype(jnp.float32)
    state = measured._replace(params={"ngrams": {RARITY: taken}}, ema={"ngrams": {RARITY: taken}})
    own = measured.params["ngrams"][RARITY]
    filled = with_known(state, own)
    for tree in (filled.params, filled.ema):
        np.testing.assert_array_equal(tree["ngrams"][RARITY][1::2], 5)
        np.testing.assert_array_equal(tree["ngrams"][RARITY][::2], own[::2])
    assert np.any(own[::2] > 0)


def test_what_is_measured_is_not_in_the_norm_of_the_weights():
    tree = {"ngrams": {"embed_tokens": jnp.full((4, 1), 0.5), RARITY: jnp.full(4, 100.0)}}
    updates = jax.tree.map(lambda x: 0.1 * x, tree)
    found = layer_metrics(tree, updates, {"ngrams": {**updates["ngrams"], RARITY: jnp.zeros(4)}})
    np.testing.assert_allclose(found["weight_norm.ngrams"], 1)
    np.testing.assert_allclose(found["update_ratio.ngrams"], 0.1, rtol=1e-6)


def test_a_fresh_state_and_its_average_have_it_and_no_step_changes_it(learned):
    task, source = learned
    params = {"ngrams": {"embed_tokens": jnp.zeros((BUCKETS, 3)), RARITY: jnp.ones(BUCKETS)}}
    state = TrainState(jnp.int32(0), jnp.zeros(4, jnp.uint32), params, {}, params)
    fresh = with_rarity(state, CONFIG, task, source)
    for tree in (fresh.params, fresh.ema):
        np.testing.assert_array_equal(tree["ngrams"][RARITY], rarity(task, source, BUCKETS))
        np.testing.assert_array_equal(tree["ngrams"]["embed_tokens"], 0)
    optimizer, ones = make_optimizer(CONFIG.train), jax.tree.map(jnp.ones_like, params)
    with optax_promotes():
        moved = optimizer.init(params)
        for _ in range(2):
            updates, moved = jax.jit(optimizer.update)(ones, moved, params)
    np.testing.assert_array_equal(updates["ngrams"][RARITY], 0)
    assert np.abs(updates["ngrams"]["embed_tokens"]).min() > 0
    other = state._replace(params={"head": {}}, ema={})
    assert with_rarity(other, CONFIG, task, source) is other


def test_beside_adapters_of_another_run_nothing_is_measured(learned, monkeypatch):
    task, source = learned
    monkeypatch.setattr(rarity_module, "rarity", lambda *_: pytest.fail("it was measured"))
    state = TrainState(*[None] * len(TrainState._fields))._replace(params={"ngrams": {RARITY: jnp.ones(BUCKETS)}})
    config = replace(CONFIG, train=TrainConfig(init="run"), model=replace(CONFIG.model, lora_rank=2))
    assert with_rarity(state, config, task, source) is state
