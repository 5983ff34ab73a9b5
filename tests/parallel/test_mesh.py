"""Mesh sizes, where arrays lie, and one whole step on two of them."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import (
    MeshConfig,
    TaskConfig,
    TrainConfig,
)
from r1jax.errors import UserError
from r1jax.models.r1 import R1
from r1jax.parallel import mesh as mesh_module
from r1jax.parallel.mesh import (
    SMALLEST_SHARDED,
    abstract_mesh,
    batch_sharding,
    by_node,
    check_batch,
    check_model,
    make_mesh,
    shard_tree,
)
from r1jax.tasks.medical.task import Medical
from r1jax.train.step import NO_LIMIT, compile_step, init_state
from tests.parallel.spread import CONFIG

MODEL = CONFIG.model
ONE_LAYER = replace(
    MODEL.decoder,
    num_hidden_layers=1,
    first_k_dense_replace=0,
    num_nextn_predict_layers=0,
    num_attention_heads=2,
    initializer_range=0.1,
)
TINY = replace(
    CONFIG,
    model=replace(MODEL, decoder=ONE_LAYER, volume=replace(MODEL.volume, layers=0), text_tokens=8, dropout=0.0),
    task=TaskConfig(fields=("nodule_present", "center_mm"), modality_dropout=0.0, augment="none"),
    train=TrainConfig(steps=10, batch_size=8, warmup_steps=0, learning_rate=1e-3),
)


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        ({}, {"data": 8}),
        ({"data": 8}, {"data": 8}),
        ({"data": 2, "fsdp": -1}, {"data": 2, "fsdp": 4}),
        ({"fsdp": 4}, {"data": 2, "fsdp": 4}),
        ({"data": 1, "fsdp": 2, "expert": -1, "tensor": 2}, {"fsdp": 2, "expert": 2, "tensor": 2}),
        ({"data": 1, "sequence": 8}, {"sequence": 8}),
    ],
)
def test_sizes(asked, sizes):
    mesh = make_mesh(MeshConfig(**asked))
    assert mesh.axis_names == ("pipe", "data", "fsdp", "expert", "sequence", "tensor")
    assert {name: size for name, size in mesh.shape.items() if size > 1} == sizes


def test_inner_axes_stay_within_a_node():
    devices = [
        SimpleNamespace(id=i, process_index=i // 2) for i in range(8)
    ]  # two devices a process, two processes a node
    assert by_node([devices[i] for i in (5, 2, 7, 0, 3, 6, 1, 4)]) == devices
    slices = [SimpleNamespace(id=i, process_index=i, slice_index=i % 2) for i in range(4)]
    assert [device.id for device in by_node(slices)] == [0, 2, 1, 3]
    grid = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4), jax.devices()[::-1]).devices.squeeze()
    assert [[device.id for device in row] for row in grid] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_mesh_can_be_described_without_its_devices():
    mesh = abstract_mesh(MeshConfig(fsdp=64, tensor=8), 8)
    assert dict(mesh.shape) == {"pipe": 1, "data": 1, "fsdp": 64, "expert": 1, "sequence": 1, "tensor": 8}
    assert abstract_mesh(MeshConfig(fsdp=4), 8).shape["data"] == 2


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"tensor": 3}, "mesh.tensor is 3, but model.decoder.num_attention_heads is 2"),
        ({"tensor": 2}, "mesh.tensor is 2, but model.decoder.vocab_size is 263"),
        ({"expert": 3}, "mesh.expert is 3, but model.decoder.n_routed_experts is 8"),
    ],
)
def test_dimensions_that_do_not_divide_are_refused(sizes, told):
    config = replace(TINY.model, decoder=replace(TINY.model.decoder, vocab_size=263))
    with pytest.raises(UserError, match=told):
        check_model(sizes, config)
    check_model({"tensor": 2, "expert": 4, "fsdp": 3}, TINY.model)


def test_a_size_that_does_not_fit_is_told_with_its_axis():
    with pytest.raises(UserError, match="mesh.data 1 x mesh.fsdp 1 x mesh.tensor 2 x mesh.expert 3 does not fit 8"):
        make_mesh(MeshConfig(data=1, tensor=2, expert=3))


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (4, 4), (1, 1), (-1, -1), (-1, 16)])
def test_sizes_that_do_not_fit_are_refused(data, fsdp):
    with pytest.raises(UserError, match=rf"mesh.data {data} x mesh.fsdp {fsdp} does not fit 8 device"):
        make_mesh(MeshConfig(data, fsdp))


def test_batch_must_spread_over_the_devices_that_share_it():
    mesh = make_mesh(MeshConfig(2, 4))
    check_batch(mesh, 16)
    with pytest.raises(UserError, match="train.batch_size is 12"):
        check_batch(mesh, 12)
    check_batch(make_mesh(MeshConfig(2, 1, tensor=2, expert=2)), 12)
    batch = jax.device_put(jnp.arange(16), batch_sharding(mesh))
    assert sorted(int(s.data[0]) for s in batch.addressable_shards) == list(range(0, 16, 2))


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((512, 256), 0),
        ((256, 512), 1),
        ((513, 256), 1),
        ((8, 129, 512), 2),
        ((511, 257), None),
        ((64, 64), None),
        ((SMALLEST_SHARDED // 4, 4), 0),
    ],
    ids=["first", "second", "divisible", "widest", "nothing divisible", "small", "just large enough"],
)
def test_large_arrays_are_split_along_their_widest_divisible_axis(shape, axis):
    mesh = make_mesh(MeshConfig(2, 4))
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    expected = tuple(n // 4 if i == axis else n for i, n in enumerate(shape))
    assert shard_tree(mesh, {"a": leaf})["a"].shard_shape(shape) == expected
    assert shard_tree(make_mesh(MeshConfig(8, 1)), leaf).shard_shape(shape) == shape


def draw_batch(task):
    rng = np.random.default_rng(0)
    raw = {
        "case_id": [str(i) for i in range(8)],
        "volume": rng.integers(-1000, 400, (8, 8, 8, 8)).astype(np.int16),
        "volume_spacing": np.ones((8, 3), np.float32),
        "table": rng.uniform(0, 60, (8, 9)).astype(np.float32),
        "text": [f"case {i}" for i in range(8)],
        "target.nodule_present": np.array([0, 1] * 3 + [np.nan] * 2, np.float32),  # devices know different numbers
        "target.center_mm": np.where(np.arange(8)[:, None] < 3, rng.normal(0, 3, (8, 3)), np.nan).astype(np.float32),
    }
    return jax.tree.map(jnp.asarray, task.collate(raw))


@jax.numpy_dtype_promotion("standard")  # optax raises a float to the power of the integer step count
def run_step(mesh, start):
    """Metrics, parameters and how many of them were split, after one step."""
    task = Medical(TINY)
    batch = draw_batch(task)
    step = compile_step(TINY, R1(TINY.model, task.heads), task, mesh, batch)
    state = jax.device_put(start, shard_tree(mesh, start))
    state, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)), NO_LIMIT)
    split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    return jax.device_get(metrics), jax.device_get(state.params), split


@pytest.fixture(scope="module")
def start():
    """State at step 0 with drawn weights, on the host."""
    task, rng = Medical(TINY), np.random.default_rng(1)
    model, batch = R1(TINY.model, task.heads), draw_batch(task)
    shapes = jax.eval_shape(lambda: init_state(TINY, model, task, batch))
    params = jax.tree.map(
        lambda s: (0.5 * rng.standard_normal(s.shape) / s.shape[-1] ** 0.5 + (len(s.shape) == 1)).astype(np.float32),
        shapes.params,
    )
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)._replace(params=params, ema=params)


@pytest.fixture(scope="module")
def on_one_device(start):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return run_step(mesh, start)


def test_a_step_on_eight_devices_equals_one_on_one(start, on_one_device, monkeypatch):
    monkeypatch.setattr(mesh_module, "SMALLEST_SHARDED", 64)  # the tiny arrays are to be split too
    metrics, params, _ = on_one_device
    other_metrics, other, split = run_step(make_mesh(MeshConfig(2, 4)), start)
    assert split > 10
    for name, value in metrics.items():
        np.testing.assert_allclose(other_metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 1e-5, start.params, params)
    assert np.mean(jax.tree.leaves(moved)) > 0.8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), params, other)
