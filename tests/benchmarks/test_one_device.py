"""benchmarks/one_device.py: it times three different programs of one step, and its ratios are those of a round."""

import jax
import numpy as np
import pytest

from benchmarks.one_device import PROGRAMS, TURNS, config_of, lowered, ratios, table
from benchmarks.overhead import setting_of


@jax.numpy_dtype_promotion("standard")  # optax raises a float to the power of the integer step count
def test_the_programs_differ_in_what_they_say_of_devices():
    setting = setting_of(config_of("language", "tiny"), jax.devices()[:1])
    texts = {program: lowered(setting, program).as_text() for program in PROGRAMS}
    assert {name: "sdy.mesh" in text for name, text in texts.items()} == {"plain": False, "mesh": True, "spread": True}
    constraints = {name: text.count("sdy.sharding_constraint") for name, text in texts.items()}
    assert constraints["plain"] == constraints["mesh"] == 0 and constraints["spread"] > 10


@pytest.mark.parametrize("scale", ["tiny", "full"])
def test_both_configs_say_a_mesh_of_one_device(scale):
    for name in ("language", "medical"):
        config = config_of(name, scale)
        assert config.task.name == name and (config.mesh.data, config.mesh.fsdp) == (1, 1)


def test_ratios_are_those_of_neighbours():
    counted = {"plain": np.array([10.0, 20.0, 40.0]), "mesh": np.array([11.0, 20.0, 36.0])}
    counted |= {turn: counted["plain"] for turn in TURNS[2:]}
    found = ratios(counted)
    assert found["mesh"]["median"] == 1.0 and found["mesh"]["quartiles"] == pytest.approx([0.95, 1.05])
    programs = {name: {"ms": 20.0, "loss": 4.0} for name in PROGRAMS} | {"mesh": {"ms": 20.0, "loss": 4.004}}
    lines = table({"configs": {"medical": {"programs": programs, "ratios": found}}}).splitlines()
    assert lines[2] == "| medical | plain | 20.000 | 1.0000 (with itself) | 1.0000 to 1.0000 | 0e+00 |"
    assert lines[3] == "| medical | mesh | 20.000 | 1.0000 | 0.9500 to 1.0500 | 1e-03 |"
