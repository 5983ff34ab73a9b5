"""States that are made in parts, and that move from mesh to mesh through checkpoints."""

import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest

from r1jax.config import MeshConfig
from r1jax.models import initial
from r1jax.models.r1 import R1
from r1jax.parallel import mesh as mesh_module
from r1jax.parallel.mesh import make_mesh, shard_tree
from r1jax.parallel.show import bytes_a_device
from r1jax.parallel.stages import into_stages, out_of_stages, stages_on
from r1jax.tasks.language.task import Language
from r1jax.train.checkpoint import abstract_like
from r1jax.train.checkpoints import write_sealed
from r1jax.train.plan import example_batch
from r1jax.train.step import init_state
from tests.train.tiny_language import get_config

MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 2, "data": 4},
    {"expert": 4, "fsdp": 2},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"sequence": 4, "tensor": 2},
]


PIPELINES = [
    {"pipe": 4, "fsdp": 2},
    {},
    {"pipe": 2, "interleave": 2, "expert": 2, "tensor": 2},
    {"fsdp": 8},
]
"""Meshes, one of them a single device."""


@pytest.fixture(scope="module")
def made():
    """Config, and a function that makes the fresh state."""
    config = get_config()
    task = Language(config)
    model, batch = R1(config.model, task.heads), example_batch(task.source("train"), task, 8)
    return config, lambda: init_state(config, model, task, batch)


@pytest.fixture(autouse=True)
def tiny_arrays_are_split(monkeypatch):
    monkeypatch.setattr(mesh_module, "SMALLEST_SHARDED", 64)


def test_a_fresh_state_is_made_in_parts(made, monkeypatch):
    monkeypatch.setattr(initial, "LARGE", 64)
    _, init = made
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    abstract = jax.eval_shape(init)
    compiled = jax.jit(init, out_shardings=shard_tree(mesh, abstract)).lower().compile()
    own, whole = sum(bytes_a_device(mesh, abstract)), sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    assert compiled.memory_analysis().output_size_in_bytes == pytest.approx(own, rel=0.05)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * whole
    assert "all-gather" not in compiled.as_text() and "all-reduce" not in compiled.as_text()
    state = compiled()
    held = sum(shard.data.nbytes for x in jax.tree.leaves(state) for shard in x.addressable_shards[:1])
    assert held == own < 0.3 * whole
    alone = jax.jit(init)()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), state, alone)


def test_checkpoints_move_between_meshes_bit_for_bit(made, tmp_path):
    config, init = made
    state, abstract = jax.jit(init)(), jax.eval_shape(init)
    first = jax.device_get(state)
    for number, sizes in enumerate([*MESHES, MESHES[0]]):
        mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
        saved = write_sealed(tmp_path / str(number), state, config, {})
        state = saved.restore(abstract_like(abstract, shard_tree(mesh, abstract)))
        split = [x for x in jax.tree.leaves(state.params) if not x.sharding.is_fully_replicated]
        assert bool(split) == (sizes != {"data": 8})
        for a, b in itertools.zip_longest(jax.tree.leaves(first), jax.tree.leaves(jax.device_get(state))):
            assert a.tobytes() == b.tobytes()


@pytest.mark.slow
def test_layers_move_between_pipelines_bit_for_bit(tmp_path):
    tiny = get_config()
    deep = replace(tiny.model.decoder, num_hidden_layers=6, first_k_dense_replace=1, num_nextn_predict_layers=0)
    config = replace(tiny, model=replace(tiny.model, decoder=deep))
    task = Language(config)
    model, batch = R1(config.model, task.heads), example_batch(task.source("train"), task, 8)
    abstract, rng = jax.eval_shape(lambda: init_state(config, model, task, batch)), np.random.default_rng(0)
    first = jax.tree.map(lambda x: rng.integers(0, 256, (*x.shape, 4), np.uint8).view(x.dtype)[..., 0], abstract)
    state, mesh, stages = first, make_mesh(MeshConfig(), jax.devices()[:1]), None
    for number, sizes in enumerate([*PIPELINES, PIPELINES[0]]):
        saved = write_sealed(tmp_path / str(number), out_of_stages(state, mesh, stages), config, {})
        layout = MeshConfig(**{"data": 1, **sizes})
        mesh = make_mesh(layout, jax.devices()[: 8 if sizes else 1])
        stages = stages_on(mesh, layout, deep)
        state = into_stages(saved.restore(abstract_like(abstract, shard_tree(mesh, abstract))), mesh, stages)
        assert ("stages" in state.params["decoder"]) == ("pipe" in sizes)
        found = jax.device_get(out_of_stages(state, mesh, stages))
        for a, b in itertools.zip_longest(jax.tree.leaves(first), jax.tree.leaves(found)):
            assert a.tobytes() == b.tobytes()
