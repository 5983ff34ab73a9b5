"""The language task: figures against sums in float64, the loss put together from its parts, what is refused."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import Config, DataConfig, DecoderConfig, ModelConfig, TaskConfig
from r1jax.errors import UserError
from r1jax.models.moe import RouterStats
from r1jax.models.r1 import Inputs, Output
from r1jax.tasks.language.figures import language_figures, language_intervals
from r1jax.tasks.language.task import Language
from r1jax.validation import validate

CONFIG = Config(
    model=ModelConfig(modalities=("text",), text_tokens=8),
    task=TaskConfig(name="language", label_smoothing=0.0, mtp_until=0.5, balance_weight=0.01),
    data=DataConfig(train_cases=8, val_cases=4, test_cases=4),
)


def draw(count=30, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 9, count).astype(np.float32)
    found = {
        "nats": (tokens * rng.uniform(0.5, 2, count)).astype(np.float32),
        "tokens": tokens,
        "mtp_nats": (tokens * rng.uniform(1, 3, count)).astype(np.float32),
        "mtp_tokens": tokens,
        "load.0": rng.integers(0, 5, (count, 4)).astype(np.float32),
    }
    return found, (2 * tokens).astype(np.float32)


def test_figures_are_ratios_of_sums():
    found, size = draw()
    figures = language_figures(found, size)
    total = {name: x.astype(np.float64).sum(axis=0) for name, x in found.items()}
    assert figures["loss"] == pytest.approx(total["nats"] / total["tokens"])
    assert figures["perplexity"] == pytest.approx(np.exp(total["nats"] / total["tokens"]))
    assert figures["bits_per_byte"] == pytest.approx(total["nats"] / np.log(2) / (2 * total["tokens"]))
    assert figures["mtp_loss"] == pytest.approx(total["mtp_nats"] / total["tokens"])
    assert figures["load.0"] == total["load.0"].tolist()
    assert figures["violation.0"] == pytest.approx(total["load.0"].max() / total["load.0"].mean() - 1)


def test_intervals_hold_the_figures():
    found, size = draw(200)
    figures, intervals = language_figures(found, size), language_intervals(found, size, resamples=200)
    assert intervals.keys() == {"loss", "bits_per_byte", "perplexity", "mtp_loss"}
    for name, estimate in intervals.items():
        assert estimate.low < estimate.value < estimate.high and estimate.value == pytest.approx(figures[name])
    wide = language_intervals({k: x[:20] for k, x in found.items()}, size[:20], resamples=200)["loss"]
    assert wide.high - wide.low > intervals["loss"].high - intervals["loss"].low


def test_loss_is_put_together_from_its_parts():
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    router = tuple(RouterStats(jnp.ones(4), jnp.asarray(x), jnp.ones((2, 4))) for x in (1.0, 3.0))
    output = Output({}, router, None, array(2, 8, 5), array(2, 7, 5), array(9, 5))
    inputs = Inputs(text=jnp.asarray(rng.integers(0, 9, (2, 8)), jnp.int32), text_valid=jnp.ones((2, 8), bool))
    for share, weight in ((0.49, 0.3), (0.5, 0.1)):
        total, parts = Language(CONFIG).loss(output, inputs, {}, jnp.asarray(share))
        np.testing.assert_allclose(total, parts["next"] + weight * parts["mtp"] + 0.01 * (1.0 + 3.0), rtol=1e-6)
        assert parts["balance"] == 2.0


def test_a_vocabulary_that_is_too_small():
    config = replace(CONFIG, model=replace(CONFIG.model, decoder=DecoderConfig(vocab_size=258)))
    with pytest.raises(UserError, match="vocab_size is 258, but the tokenizer .bytes. has 259"):
        Language(config)


def test_parts_of_the_data(tmp_path):
    task = Language(CONFIG)
    assert len({task.source(part).fingerprint for part in ("train", "val", "test")}) == 3
    with pytest.raises(UserError, match="data.split is 'all', but the synthetic data has train, val, test"):
        task.source("all")
    (tmp_path / "train.txt").write_text("one")
    given = Language(replace(CONFIG, data=replace(CONFIG.data, path=str(tmp_path))))
    assert given.source("train").tokens.tolist() == task.vocabulary.encode(["one"])[0]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            replace(CONFIG, model=replace(CONFIG.model, modalities=("table", "text"))),
            "text alone for the language task",
        ),
        (
            replace(CONFIG, model=replace(CONFIG.model, text_tokens=2)),
            "model.text_tokens is 2, but it must be at least 3",
        ),
    ],
)
def test_what_the_task_asks_of_the_model(config, told):
    validate(CONFIG)
    with pytest.raises(UserError, match=told):
        validate(config)
