"""A model with everything in it, and its training by plain gradient descent on any mesh."""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r1jax.config import (
    Config,
    DecoderConfig,
    MeshConfig,
    ModelConfig,
    TableConfig,
    TaskConfig,
    TrainConfig,
    VisionConfig,
)
from r1jax.models.r1 import R1
from r1jax.parallel.mesh import batch_sharding, make_mesh, shard_tree, traced_for
from r1jax.parallel.rules import AXES
from r1jax.parallel.stages import into_stages, out_of_stages, stages_on
from r1jax.tasks.medical.task import Medical
from r1jax.train.step import batch_gradients, init_state

STEPS = 5
RATE = 0.001
"""Small: steps amplify rounding, at twenty times this rate more than a thousandfold over twenty."""
SMALLEST = 1e-4
"""Norm below which a gradient is nothing but rounding: a bias before a softmax has none."""
CONFIG = Config(
    model=ModelConfig(
        modalities=("volume", "table", "text"),
        decoder=DecoderConfig(
            vocab_size=264,
            hidden_size=16,
            num_hidden_layers=2,
            first_k_dense_replace=1,
            num_nextn_predict_layers=1,
            num_attention_heads=4,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_nope_head_dim=4,
            qk_rope_head_dim=4,
            v_head_dim=4,
            intermediate_size=32,
            moe_intermediate_size=8,
            initializer_range=0.3,
        ),
        volume=VisionConfig(size=(8, 8, 8), stem_stride=4, widths=(8,), blocks=(1,), layers=1),
        table=TableConfig(layers=0, frequencies=2),
        text_tokens=13,
        dropout=0.1,
    ),
    task=TaskConfig(fields=("nodule_present", "center_mm"), text_weight=1.0, augment="none"),
    train=TrainConfig(steps=STEPS, batch_size=8, warmup_steps=0),
)
"""8 cells, 9 fields, 13 bytes and 2 queries: a sequence of 32."""


@dataclass(frozen=True)
class Course:
    """What a training gave: loss, gradients and weights of every step."""

    losses: np.ndarray
    gradients: list[Any]
    params: Any
    split: int
    """Weights that were not whole on every device."""
    waited: np.ndarray
    """Choices of experts that needed a second exchange, by step."""


def start(config: Config = CONFIG, scale: float = 0.5) -> Any:
    """Drawn weights, on the host: matrices that keep this much of a state's size."""
    task, rng = Medical(config), np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: init_state(config, R1(config.model, task.heads), task, batch_of(task, 0)))
    return jax.tree.map(
        lambda s: (scale * rng.standard_normal(s.shape) / s.shape[-1] ** 0.5 + (len(s.shape) == 1)).astype(np.float32),
        shapes.params,
    )


def batch_of(task: Medical, step: int) -> dict[str, jax.Array]:
    """Cases of a step; devices know different numbers of targets."""
    rng = np.random.default_rng(step)
    raw = {
        "case_id": [str(i) for i in range(8)],
        "volume": rng.integers(-1000, 400, (8, 8, 8, 8)).astype(np.int16),
        "volume_spacing": np.ones((8, 3), np.float32),
        "table": rng.uniform(0, 60, (8, 9)).astype(np.float32),
        "text": [f"case {i} {step}" for i in range(8)],
        "target.nodule_present": np.array([0, 1] * 3 + [np.nan] * 2, np.float32),
        "target.center_mm": np.where(np.arange(8)[:, None] < 3, rng.normal(0, 3, (8, 3)), np.nan).astype(np.float32),
    }
    return jax.tree.map(jnp.asarray, task.collate(raw))


@jax.numpy_dtype_promotion("standard")
def course(mesh_config: MeshConfig | None, params: Any, config: Config = CONFIG, steps: int = STEPS) -> Course:
    """Trains on a mesh of as many devices as its sizes multiply to, or on the first device alone."""
    mesh = one_device() if mesh_config is None else make_mesh(mesh_config, jax.devices()[: size_of(mesh_config)])
    config = replace(config, mesh=mesh_config or MeshConfig())
    task = Medical(config)
    model, key = R1(config.model, task.heads), jax.random.key(3)

    def step(params: Any, batch: Any, number: jax.Array) -> Any:
        key_now, share = jax.random.fold_in(key, number), number / steps
        gradients, loss, _, _, waited = batch_gradients(config, model, task, params, {}, batch, key_now, share)
        params = jax.tree.map(lambda p, g: p - RATE * g, params, gradients)
        return params, gradients, loss, sum(waited, jnp.zeros((), jnp.int32))

    stages = stages_on(mesh, config.mesh, config.model.decoder)
    params = into_stages(jax.device_put(params, shard_tree(mesh, params)), mesh, stages)
    where, whole = shard_tree(mesh, params), NamedSharding(mesh, PartitionSpec())
    run = jax.jit(
        traced_for(mesh, config.mesh, step),
        in_shardings=(where, batch_sharding(mesh), whole),
        out_shardings=(where, where, whole, whole),
    )
    split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    losses, gradients, waited = [], [], []
    for number in range(steps):
        batch = jax.device_put(batch_of(task, number), batch_sharding(mesh))
        params, gradient, loss, late = run(params, batch, jnp.asarray(number))
        losses.append(float(loss))
        gradients.append(jax.device_get(out_of_stages(gradient, mesh, stages)))
        waited.append(int(late))
    params = jax.device_get(out_of_stages(params, mesh, stages))
    return Course(np.asarray(losses), gradients, params, split, np.asarray(waited))


def assert_same(course: Course, alone: Course) -> None:
    """Refuses a training that is not that of one device, but for the order of additions in fp32."""
    np.testing.assert_allclose(course.losses, alone.losses, rtol=1e-5)
    for step, (one, other) in enumerate(zip(course.gradients, alone.gradients, strict=True)):
        assert furthest(one, other) < 1e-5, f"gradients of step {step}"
    assert furthest(course.params, alone.params) < 1e-5


def size_of(mesh_config: MeshConfig) -> int:
    """Product of the sizes of a mesh."""
    return math.prod(getattr(mesh_config, axis) for axis in AXES)


def one_device() -> Mesh:
    """A mesh of the first device alone."""
    return make_mesh(MeshConfig(), jax.devices()[:1])


def furthest(a: Any, b: Any) -> float:
    """Largest distance of two trees' arrays, relative to the norm of each array of the second."""
    distance = jax.tree.map(lambda x, y: np.linalg.norm(x - y) / max(np.linalg.norm(y), SMALLEST), a, b)
    return max(jax.tree.leaves(distance))
