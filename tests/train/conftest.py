"""The tiny experiment, built once."""

import signal
from pathlib import Path

import jax
import pytest

from r1jax.train.step import TrainState
from tests.train.experiment import Experiment, Interrupted, make_experiment


@pytest.fixture(scope="session")
def tiny() -> Experiment:
    return make_experiment()


@pytest.fixture(scope="session")
def undisturbed(tiny, tmp_path_factory) -> tuple[Path, TrainState]:
    """Folder and last state of a run that nothing disturbed; tests copy the folder before they touch it."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    state, said, _ = tiny.train(workdir)
    assert said == []
    return workdir, jax.device_get(state)


@pytest.fixture(scope="session")
def stopped(tiny, tmp_path_factory) -> Path:
    """Folder of a run that was stopped at step 15, with checkpoints of steps 12 and 15; tests copy it."""
    workdir = tmp_path_factory.mktemp("stopped")
    tiny.train(workdir, step=Interrupted(tiny.step, 15, signal.SIGTERM))
    return workdir
