"""benchmarks/pipeline.py: its meshes can divide the model, and it counts and tells what it should."""

import pytest

from benchmarks.pipeline import DEVICES, MESHES, SCHEDULES, config_of, idle, table
from r1jax.parallel.mesh import abstract_mesh, check_batch, check_model
from r1jax.parallel.stages import schedule_on


@pytest.mark.parametrize("name", MESHES)
def test_four_devices_can_divide_the_model(name):
    config = config_of(25, MESHES[name], "full")
    mesh = abstract_mesh(config.mesh, DEVICES)
    check_model(mesh.shape, config.model)
    check_batch(mesh, config.train.batch_size)
    schedule = schedule_on(mesh, config)
    assert schedule is None if name == "tensor" else schedule.microbatches == 16


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_idle_turns_are_those_of_the_formula(schedule):
    row = idle(schedule)
    assert 0 < row["formula"] < 0.5 and row["idle"] == pytest.approx(row["formula"], rel=1e-9)


def test_the_table_says_how_much_less_is_sent():
    report = {"sent": {"25": {"tensor": {"bytes": 2.0**30}, "pipe": {"bytes": 2.0**25}}}, "idle": [idle(SCHEDULES[1])]}
    lines = table(report).splitlines()
    assert "| 25 | pipe | 32 | -96.9% |" in lines and "| 4 | 1 | 16 | no | 15.8% | 15.8% |" in lines
