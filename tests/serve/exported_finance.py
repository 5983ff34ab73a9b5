"""A finance checkpoint to export, made without training, with thresholds among its own scores."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from r1jax.config import AlertConfig, Config, FinanceConfig, SeriesConfig, TaskConfig
from r1jax.models.r1 import R1
from r1jax.tasks.finance.operating import operating_points
from r1jax.tasks.finance.task import Finance
from r1jax.train.checkpoint import Checkpoint
from r1jax.train.checkpoints import write_sealed
from r1jax.train.plan import example_batch
from r1jax.train.run import describe
from r1jax.train.step import TrainState, init_state
from tests.train.tiny import get_config as tiny

ALERTS = AlertConfig(per_day=24.0, step_up_per_day=28.0, block_probability=0.22)


def get_config() -> Config:
    """As small as can be."""
    finance = FinanceConfig(events=4, negatives_kept=0.5, simulated_customers=40, simulated_days=80, alerts=ALERTS)
    model = dataclasses.replace(
        tiny().model,
        modalities=("series", "table", "text"),
        series=SeriesConfig(layers=1, bins=4, tokens=2, num_attention_heads=2),
        text_tokens=24,
    )
    task = TaskConfig(name="finance", label_smoothing=0.0, finance=finance)
    return dataclasses.replace(tiny(), name="tiny-finance", model=model, task=task)


def write_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint with random averaged weights; its validation is one that saw scores of the same size."""
    config = get_config()
    task = Finance(config)
    source, model = task.source("val"), R1(config.model, task.heads)
    batch = example_batch(source, task, 1)
    shapes, rng = jax.eval_shape(lambda: init_state(config, model, task, batch)), np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    ema = jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes.ema)
    assert isinstance(state, TrainState)
    score = rng.uniform(0, 1, 400).astype(np.float32)
    fraud = (rng.uniform(size=400) < score / 2).astype(np.float32)
    points = {"both": operating_points(fraud, score, 10, "isotonic")}
    meta: dict[str, Any] = {"validation": {"score": 0.5, "operating_points": points}}
    meta |= describe(source, task.pipeline)
    return write_sealed(folder, state._replace(ema=ema), config, json.loads(json.dumps(meta)))
