"""Saves checkpoints without end, in a fresh process a line of its input; JAX starts in those processes only.

Forking is safe here: no backend has started when it happens, and a child that did not come up would fail the test.
"""

import itertools
import os
import sys
from pathlib import Path

import numpy as np

from r1jax.config import Config
from r1jax.train.checkpoints import CheckpointFolder


def state(step: int) -> dict[str, np.ndarray]:
    """What belongs to a step."""
    return {"step": np.array(step, np.int32), "weights": np.random.default_rng(step).random((64, 100), np.float32)}


def save_on(folder: CheckpointFolder) -> None:
    """Goes on after the newest checkpoint until it is killed."""
    newest = folder.all()[-1].step if folder.all() else 0
    for step in itertools.count(newest + 1):
        folder.save(step, state(step), Config(), {"step": step, "validation": None})
        print("saved", step, flush=True)


if __name__ == "__main__":
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            save_on(CheckpointFolder(Path(sys.argv[1])))
        print("child", child, flush=True)
        os.waitpid(child, 0)
        print("dead", flush=True)
