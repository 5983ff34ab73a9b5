"""The schedule of a pipeline: who computes what when, against what a ring can do."""

import numpy as np
import pytest

from r1jax.config import DecoderConfig, MeshConfig
from r1jax.errors import UserError
from r1jax.ops.pipeline import Schedule, schedule_of, stages_of
from r1jax.parallel.mesh import abstract_mesh
from r1jax.parallel.rules import placement_on

SCHEDULES = [
    Schedule(devices=4, rounds=1, microbatches=8),
    Schedule(devices=4, rounds=1, microbatches=6),
    Schedule(devices=2, rounds=3, microbatches=4),
    Schedule(devices=4, rounds=2, microbatches=12),
    Schedule(devices=4, rounds=1, microbatches=16, hop=2),
    Schedule(devices=3, rounds=2, microbatches=12, hop=2),
]


def turns(schedule):
    """What a ring does by the schedule: (device, round, microbatch) and its tick."""
    devices, ticks = np.indices((schedule.devices, schedule.ticks))
    turn = schedule.turn(devices, ticks)
    rows = zip(devices[turn.busy], turn.round[turn.busy], turn.microbatch[turn.busy], ticks[turn.busy], strict=True)
    return [(tuple(map(int, row[:3])), int(row[3])) for row in rows]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_turn_comes_once_and_when_its_input_has_arrived(schedule):
    found = turns(schedule)
    when = dict(found)
    assert len(found) == len(when) == schedule.devices * schedule.rounds * schedule.microbatches
    for (device, number, microbatch), tick in found:
        assert schedule.tick(device, number, microbatch) == tick
        if device:
            assert tick == when[device - 1, number, microbatch] + schedule.hop
        elif number:  # straight from the last device, for there is no place to wait in
            assert tick == when[schedule.devices - 1, number - 1, microbatch] + schedule.hop


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_idle_ticks_are_the_bubble(schedule):
    p, v, m, hop = schedule.devices, schedule.rounds, schedule.microbatches, schedule.hop
    idle = 1 - len(turns(schedule)) / (p * schedule.ticks)
    assert idle == pytest.approx(hop * (p - 1) / (v * m + hop * (p - 1)), rel=1e-12)
    assert schedule.bubble == pytest.approx(idle, rel=1e-12)


@pytest.mark.parametrize(
    ("layers", "dense", "devices", "rounds", "pipelined", "order"),
    [
        (5, 1, 4, 1, range(1, 5), (1, 2, 3, 4)),
        (6, 1, 2, 2, range(2, 6), (2, 4, 3, 5)),  # the odd one comes first, beside the dense one
        (8, 0, 2, 2, range(8), (0, 1, 4, 5, 2, 3, 6, 7)),
        (6, 4, 2, 1, range(4), (0, 1, 2, 3)),
        (61, 3, 16, 1, range(13, 61), tuple(range(13, 61))),
    ],
)
def test_equal_layers_are_divided_evenly(layers, dense, devices, rounds, pipelined, order):
    stages = stages_of(DecoderConfig(num_hidden_layers=layers, first_k_dense_replace=dense), devices, rounds)
    assert len(stages.layers) == len(pipelined) and list(stages.layers) == list(pipelined)
    assert stages.order == order


def test_too_few_layers_are_refused():
    with pytest.raises(
        UserError, match="mesh.pipe is 2 and mesh.interleave 2, but the longest run .* has 3: .* least 4"
    ):
        stages_of(DecoderConfig(num_hidden_layers=5, first_k_dense_replace=2), 2, 2)


def ring(**fields):
    mesh = MeshConfig(data=2, fsdp=2, tensor=2, pipe=4, **fields)
    return placement_on(abstract_mesh(mesh, 1), 0, mesh).ring


@pytest.mark.parametrize(
    ("fields", "cases", "microbatches"),
    [
        ({}, 64, 16),
        ({}, 192, 16),
        ({}, 48, 12),
        ({}, 16, 4),
        ({"microbatches": 8}, 64, 8),
        ({"overlap": True}, 128, 32),
    ],
)
def test_microbatches_are_what_the_batch_allows(fields, cases, microbatches):
    assert schedule_of(ring(**fields), cases).microbatches == microbatches


@pytest.mark.parametrize(
    ("fields", "cases", "told"),
    [
        ({}, 40, "mesh.pipe is 4, but a batch or a part of it has 40 cases: .* multiple of 4 microbatches, each with"),
        ({"microbatches": 6}, 64, "mesh.microbatches is 6"),
        ({"microbatches": 32}, 64, "mesh.microbatches is 32, .* with a multiple of 4 case"),
        ({"microbatches": 4, "interleave": 2, "overlap": True}, 64, "multiple of 8 microbatches"),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused(fields, cases, told):
    with pytest.raises(UserError, match=told):
        schedule_of(ring(**fields), cases)
