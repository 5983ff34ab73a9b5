"""A finance checkpoint to export, made without training, with thresholds among its own scores."""

import dataclasses
from pathlib import Path

import numpy as np

from r1jax.config import AlertConfig, Config, FinanceConfig, SeriesConfig, TaskConfig
from r1jax.tasks.finance.operating import operating_points
from r1jax.tasks.finance.task import Finance
from r1jax.train.checkpoint import Checkpoint
from tests.serve.exported import write_random
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
    """A finance checkpoint of random weights; its validation is one that saw scores of the same size."""
    rng = np.random.default_rng(0)
    score = rng.uniform(0, 1, 400).astype(np.float32)
    fraud = (rng.uniform(size=400) < score / 2).astype(np.float32)
    return write_random(folder, Finance(get_config()), {"both": operating_points(fraud, score, 10, "isotonic")})
