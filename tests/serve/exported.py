"""A checkpoint to export, made without training, and what it says."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from r1jax.config import Config
from r1jax.models.r1 import R1
from r1jax.serve.export_command import ExportArguments, Opened, write
from r1jax.tasks.finance.task import Finance
from r1jax.tasks.medical.schema import RECORD_FIELDS
from r1jax.tasks.medical.task import Medical
from r1jax.train.checkpoint import Checkpoint
from r1jax.train.checkpoints import write_sealed
from r1jax.train.plan import example_batch
from r1jax.train.run import describe
from r1jax.train.step import TrainState, init_state
from tests.train.tiny import get_config

POINT = {"sensitivity": 0.8, "specificity": 0.9, "n_positive": 20, "n_negative": 30}
POINTS = {
    "both": {"nodule_present": {"threshold": 0.45, **POINT}, "malignancy": {"threshold": 0.5, **POINT}},
    "image_only": {"nodule_present": {"threshold": 0.55, **POINT}},
    "record_only": {"nodule_present": {"threshold": 0.5, **POINT}, "malignancy": {"threshold": 0.6, **POINT}},
}


def merged() -> dict[str, Any]:
    """Changes by which `write_checkpoint` makes a model that reads its text eight bytes a token, and learns none."""
    tiny = get_config()
    return {
        "model": dataclasses.replace(tiny.model, text_merge=8),
        "task": dataclasses.replace(tiny.task, text_weight=0.0),
    }


def write_checkpoint(folder: Path, **changes: Any) -> Checkpoint:
    """A medical checkpoint of random weights."""
    tiny = get_config()
    config = Config(**{f.name: getattr(tiny, f.name) for f in dataclasses.fields(tiny)} | changes)
    return write_random(folder, Medical(config), POINTS)


def write_random(folder: Path, task: Medical | Finance, points: dict[str, Any]) -> Checkpoint:
    """A checkpoint with random averaged weights, large enough for cases to differ, and given operating points."""
    config = task.config
    source, model = task.source("val"), R1(config.model, task.heads)
    batch = example_batch(source, task, 1)
    shapes, rng = jax.eval_shape(lambda: init_state(config, model, task, batch)), np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    ema = jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes.ema)
    assert isinstance(state, TrainState)
    meta = {"validation": {"score": 0.5, "operating_points": points}, **describe(source, task.pipeline)}
    return write_sealed(folder, state._replace(ema=ema), config, json.loads(json.dumps(meta)))


def export_to_jax(folder: Path, opened: Opened) -> Path:
    """The exported program, which agrees."""
    pytest.importorskip("flatbuffers", reason="JAX writes exported programs by it: r1jax[export]")
    assert write(folder, opened, ExportArguments(checkpoint="", output=""), None)["agrees"]
    return folder


def write_cases(file: Path, raw: dict[str, Any]) -> None:
    """Cases of a source as docs/data.md says; the second has no picture, the third no fields, the fourth no text."""
    table, count = raw["table"].copy(), len(raw["case_id"])
    table[2] = np.nan
    text = ["" if row == 3 else words for row, words in enumerate(raw["text"])]
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        file,
        volume=raw["volume"],
        volume_spacing=raw["volume_spacing"],
        has_volume=np.arange(count) != 1,
        case_id=np.array(raw["case_id"]),
        text=np.array(text),
        **{field.name: table[:, column] for column, field in enumerate(RECORD_FIELDS)},
    )
