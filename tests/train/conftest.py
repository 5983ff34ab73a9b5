"""The tiny experiment, built once."""

from pathlib import Path

import jax
import pytest

from r1jax.train.step import TrainState
from tests.train.experiment import Experiment, make_experiment


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
