"""A training on eight devices is that on one device, whatever the mesh: losses, every gradient, and the weights."""

from dataclasses import replace

import pytest

from r1jax.config import MeshConfig
from r1jax.parallel import mesh as mesh_module
from tests.parallel.spread import CONFIG, assert_same, course, start

STILL = replace(CONFIG, model=replace(CONFIG.model, dropout=0.0), task=replace(CONFIG.task, modality_dropout=0.0))
"""Nothing is random."""
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def weights():
    return start()


@pytest.fixture(scope="module")
def alone(weights):
    return course(None, weights)


@pytest.fixture(scope="module")
def alone_and_still(weights):
    return course(None, weights, STILL)


@pytest.fixture(autouse=True)
def tiny_arrays_are_split(monkeypatch):
    monkeypatch.setattr(mesh_module, "SMALLEST_SHARDED", 64)


def mesh(**sizes):
    return MeshConfig(**{"data": 1, **sizes})


EACH_AXIS = [{"data": 8}, {"fsdp": 8}, {"tensor": 4}, {"expert": 8}, {"sequence": 8}]
"""Alone; tests/parallel/test_pipeline.py has `pipe`."""
MIXED = [{"expert": 2, "sequence": 4}, {"fsdp": 2, "sequence": 2, "tensor": 2}]
IN_ALL = {"fsdp": 2, "expert": 2, "tensor": 2}
"""The mesh of which the quick run of the tests has the training with dropout."""


def named(sizes):
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


@pytest.mark.parametrize(
    "sizes", [*(pytest.param(sizes, marks=slow) for sizes in (*EACH_AXIS, *MIXED)), IN_ALL], ids=named
)
def test_a_mesh_computes_what_one_device_does(sizes, weights, alone):
    found = course(mesh(**sizes), weights)
    assert_same(found, alone)
    assert found.split == 0 if sizes == {"data": 8} else found.split > 10


@slow
@pytest.mark.parametrize("sizes", [MIXED[-1], IN_ALL], ids=named)
def test_without_dropout_too(sizes, weights, alone_and_still):
    assert_same(course(mesh(**sizes), weights, STILL), alone_and_still)


def test_what_finds_no_place_among_the_experts_waits_and_is_not_dropped(weights, alone):
    found = course(mesh(data=2, expert=4, expert_capacity=0.3), weights)
    assert_same(found, alone)
    assert (found.waited > 0).all()
