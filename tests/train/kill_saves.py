"""Saves checkpoints without end, in a fresh process a line of its input; JAX starts in those processes only.

After the line "hold", the second save waits before it is sealed, for as long as the process lives.

Forking is safe here: no backend has started when it happens, and a child that did not come up would fail the test.
"""

import itertools
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from r1jax.config import Config
from r1jax.train import checkpoints
from r1jax.train.checkpoints import CheckpointFolder


def state(step: int) -> dict[str, np.ndarray]:
    """What belongs to a step."""
    return {"step": np.array(step, np.int32), "weights": np.random.default_rng(step).random((64, 100), np.float32)}


def save_on(folder: CheckpointFolder, hold: bool) -> None:
    """Goes on after the newest checkpoint until it is killed."""
    newest = folder.all()[-1].step if folder.all() else 0
    if hold:
        seal, seals = checkpoints._seal, itertools.count(1)

        def wait_or_seal(*arguments: Any) -> None:
            if next(seals) == 2:
                print("holding", flush=True)
                threading.Event().wait()
            seal(*arguments)

        checkpoints._seal = wait_or_seal
    for step in itertools.count(newest + 1):
        folder.save(step, state(step), Config(), {"step": step, "validation": None})
        print("saved", step, flush=True)


if __name__ == "__main__":
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            save_on(CheckpointFolder(Path(sys.argv[1])), line.strip() == "hold")
        print("child", child, flush=True)
        os.waitpid(child, 0)
        print("dead", flush=True)
