"""The tiny experiment as train.py would build it, for the tests of this folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from r1jax.cli import load_config
from r1jax.config import Config
from r1jax.data.source import Source
from r1jax.models.r1 import R1
from r1jax.tasks.catalog import TASKS
from r1jax.tasks.task import Task
from r1jax.train import recover
from r1jax.train import run as run_module
from r1jax.train.evaluation import Evaluator
from r1jax.train.loop import Loop
from r1jax.train.plan import example_batch
from r1jax.train.run import open_run, restore_or_init
from r1jax.train.step import NO_LIMIT, TrainState, compile_step, init_state

CLOCK = (
    "examples_per_second",
    "tokens_per_second",
    "data_wait",
    "mfu",
    "goodput",
    "host_memory_peak_bytes",
    "device_memory_peak_bytes",
)
"""Figures of a row of metrics.jsonl that differ from run to run."""


@dataclass(frozen=True)
class Experiment:
    """What train.py makes of a config."""

    config: Config
    task: Task
    model: R1
    mesh: Mesh
    source: Source
    validation: Source
    batch: dict[str, jax.Array]
    evaluator: Evaluator
    step: Any

    fresh: TrainState

    def init(self) -> TrainState:
        """A fresh state that a step may take over."""
        return jax.tree.map(jnp.copy, self.fresh)

    @contextmanager
    def traced_once(self) -> Iterator[None]:
        """Gives runs the fresh state and the evaluator of the experiment, which they would trace and compile anew."""
        with (
            mock.patch.object(run_module, "init_state", lambda *_: self.init()),
            mock.patch.object(recover, "Evaluator", lambda *_: self.evaluator),
        ):
            yield

    def batches(self, count: int) -> list[dict[str, np.ndarray]]:
        """Batches of the first training cases, in order."""
        size = self.config.train.batch_size
        return [self.task.collate(self.source.read_batch(np.arange(i * size, (i + 1) * size))) for i in range(count)]

    def train(self, workdir: Path, step: Any = None, on_open: Any = None) -> tuple[TrainState, list[str], list[int]]:
        """Does what train.py does in a folder.

        Args:
          workdir: Run folder.
          step: Takes the place of the compiled step.
          on_open: Called with the run before its first step.

        Returns:
          The last state, what was said about where it came from, and the signals that ended it.
        """
        config = replace(self.config, workdir=str(workdir))
        with self.traced_once(), open_run(config) as run:
            state, said = restore_or_init(config, run, self.model, self.task, self.mesh, self.source, self.batch)
            if on_open is not None:
                on_open(run)
            take = step or self.step
            parts = (self.task, self.mesh, self.evaluator, take, state, self.source, self.validation)
            return Loop(config, run, *parts).fit(), said, run.stop


def optax_promotes() -> Any:
    """Optax relies on implicit promotion (a float to the power of the step count), which the tests forbid."""
    return jax.numpy_dtype_promotion("standard")


def one_device() -> Mesh:
    """A mesh of the first device alone: the programs compile in a fraction of the time."""
    return jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])


def make_experiment(*flags: str, file: str = "tiny.py") -> Experiment:
    """The tiny experiment, or another of this folder, with some fields replaced."""
    config = load_config(["--config", str(Path(__file__).with_name(file)), *flags]).config
    task = TASKS[config.task.name](config)
    model, mesh = R1(config.model, task.heads), one_device()
    source, validation = task.source("train"), task.source("val")
    batch = example_batch(source, task, config.train.batch_size)
    with optax_promotes():
        step = compile_step(config, model, task, mesh, batch)
        fresh = jax.jit(lambda: init_state(config, model, task, batch))()
    return Experiment(config, task, model, mesh, source, validation, batch, Evaluator(model, task, mesh), step, fresh)


class Interrupted:
    """The compiled step; a signal arrives at one of its calls."""

    def __init__(self, step, at, number):
        self.step, self.left, self.number = step, at, number

    def __call__(self, state, batch, limit=NO_LIMIT):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        return self.step(state, batch, limit)
