"""A training whose layers are divided over devices is that on one device: losses, every gradient, and the weights."""

from dataclasses import replace

import pytest

from r1jax.config import MeshConfig
from r1jax.parallel import mesh as mesh_module
from tests.parallel.spread import CONFIG, assert_same, course, start

DEEP = replace(
    CONFIG,
    model=replace(CONFIG.model, scan_layers=True, decoder=replace(CONFIG.model.decoder, num_hidden_layers=6)),
)
"""One dense layer and five with experts, of which one is left over; scanned, so that dropout has the same keys."""
STILL = replace(DEEP, model=replace(DEEP.model, dropout=0.0), task=replace(DEEP.task, modality_dropout=0.0))
"""Nothing is random."""
THRIFTY = replace(DEEP, model=replace(DEEP.model, remat="full"), train=replace(DEEP.train, accumulation=2))
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def weights():
    return start(DEEP, 0.25)  # with twice that, six layers amplify rounding to more than what is allowed


@pytest.fixture(scope="module")
def alone(weights):
    return course(None, weights, DEEP)


@pytest.fixture(autouse=True)
def tiny_arrays_are_split(monkeypatch):
    monkeypatch.setattr(mesh_module, "SMALLEST_SHARDED", 64)


def mesh(**sizes):
    return MeshConfig(**{"data": 1, **sizes})


@slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"pipe": 2, "interleave": 2, "data": 2, "expert": 2},
        {"pipe": 4, "overlap": True, "tensor": 2},
        {"pipe": 2, "sequence": 2, "fsdp": 2},
    ],
    ids=lambda sizes: ", ".join(f"{name} {size}" for name, size in sizes.items()),
)
def test_a_pipeline_computes_what_one_device_does(sizes, weights, alone):
    found = course(mesh(**sizes), weights, DEEP)
    assert_same(found, alone)
    assert found.split > 50


@slow
def test_without_dropout_too(weights):
    assert_same(course(mesh(pipe=4), weights, STILL), course(None, weights, STILL))


@slow
def test_with_accumulation_and_rematerialisation_too(weights, alone):
    assert_same(course(mesh(pipe=4, tensor=2), weights, THRIFTY), alone)
