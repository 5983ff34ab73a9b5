"""What the benchmarks of r1jax share: a run through train.py, predictions of its last checkpoint, the environment."""

import argparse
import dataclasses
import importlib.metadata
import json
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # noqa: E402
from benchmarks.luna16_peers import environment  # noqa: E402
from r1jax.cli import load_config  # noqa: E402
from r1jax.config import Config  # noqa: E402
from r1jax.models.r1 import R1  # noqa: E402
from r1jax.parallel.mesh import make_mesh, shard_tree  # noqa: E402
from r1jax.parallel.platform import start_platform  # noqa: E402
from r1jax.tasks.catalog import TASKS  # noqa: E402
from r1jax.train.checkpoint import Checkpoint, abstract_like  # noqa: E402
from r1jax.train.checkpoints import CheckpointFolder, check_same_run  # noqa: E402
from r1jax.train.evaluation import Evaluator  # noqa: E402
from r1jax.train.loop import served  # noqa: E402
from r1jax.train.plan import example_batch  # noqa: E402
from r1jax.train.step import init_state  # noqa: E402

FINISHED = "finished.json"


class Trained(NamedTuple):
    """A finished run."""

    checkpoint: Checkpoint
    """The last one, whatever its validation score."""
    seconds: float
    """Wall time of train.py, compilation and validation included."""
    examples_per_second: float
    """Median over the logged stretches of training."""


def train_run(words: Sequence[str], workdir: Path, resume: bool = False, start: Checkpoint | None = None) -> Trained:
    """Trains one run through train.py.

    Args:
      words: Command line of train.py, without `--workdir`.
      workdir: Folder of the run; emptied first.
      resume: Takes a run that has finished in this folder as it is; it must have had the same config.
      start: Goes on from a copy of this checkpoint of another run.
    """
    words = [*words, "--workdir", str(workdir)]
    note = workdir / FINISHED
    if resume and note.is_file():
        checkpoint = CheckpointFolder(workdir / "checkpoints").all()[-1]
        config = load_config(words).config
        check_same_run(checkpoint.config(), config, workdir)
        start_platform(config.platform)
        return Trained(checkpoint, **json.loads(note.read_text()))
    shutil.rmtree(workdir, ignore_errors=True)
    if start is not None:
        shutil.copytree(start.path, workdir / "checkpoints" / start.path.name)
    began = time.perf_counter()
    if code := train.main(words):
        raise SystemExit(code)
    seconds = time.perf_counter() - began
    rows = [json.loads(row) for row in (workdir / "metrics.jsonl").read_text().splitlines()]
    rates = [row["examples_per_second"] for row in rows if "examples_per_second" in row]
    told = {"seconds": seconds, "examples_per_second": float(np.median(rates))}
    note.write_text(json.dumps(told))
    return Trained(CheckpointFolder(workdir / "checkpoints").all()[-1], **told)


class Reordered:
    """Cases of a source in an order of their own: what is said of a case must not depend on those beside it."""

    def __init__(self, source: Any, order: np.ndarray) -> None:
        """Takes the source, and which of its cases stands at each place."""
        self.source, self.order = source, order

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.order)

    def read_batch(self, indices: np.ndarray) -> dict[str, Any]:
        """As of the source."""
        return self.source.read_batch(self.order[indices])


def predict(
    checkpoint: Checkpoint, split: str, batch_size: int, views: int | None = None, config: Config | None = None
):
    """Predictions, targets and ids of a part of the data that the checkpoint was trained on, or of other data.

    Args:
      checkpoint: Its averaged weights are used where averaging is on.
      split: train, val or test.
      batch_size: Cases a forward pass; that of training finds its compiled program in the cache.
      views: Turned and mirrored views to average; by default as many as in the checkpoint's config.
      config: Of the same model, with the data to read; None is that of the checkpoint.
    """
    config = config or checkpoint.config()
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, views=views or config.task.views))
    task, mesh = TASKS[config.task.name](config), make_mesh(config.mesh)
    model, source = R1(config.model, task.heads), task.source(split)
    batch = example_batch(source, task, config.train.batch_size)
    abstract = jax.eval_shape(lambda: init_state(config, model, task, batch))
    state = checkpoint.restore(abstract_like(abstract, shard_tree(mesh, abstract)))
    found, targets, ids = Evaluator(model, task, mesh).predict(
        served(state, config), source, batch_size=batch_size, modes=("both",)
    )
    return found["both"], targets, ids


def jax_environment(args: argparse.Namespace) -> dict:
    """Versions, hardware and command, without the paths of this machine; `args` has `overrides`."""
    overrides = [re.sub(r"^(--[^=]*=)?.*/", r"\1", word) for word in args.overrides]
    told = argparse.Namespace(**vars(args) | {"overrides": overrides, "device": "cpu"})  # torch need not look for one
    result = environment(told)
    del result["arguments"]["device"]
    result["hardware"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {result['hardware']}"
    ours = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    unused = ("torch", "torchvision")
    result["versions"] = {k: v for k, v in result["versions"].items() if k not in unused} | ours
    return result
