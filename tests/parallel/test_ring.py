"""Simple layers on a ring of devices, against the same layers one after another: values, gradients and what travels."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from r1jax.config import DecoderConfig, MeshConfig
from r1jax.ops.axes import constrain
from r1jax.ops.pipeline import pipeline, schedule_of, stages_of
from r1jax.parallel.collectives import collectives
from r1jax.parallel.mesh import make_mesh, traced_for
from r1jax.parallel.rules import placement_on

CASES, WIDTH = 16, 6


def layers(weights, numbers, x, rows, shared):
    """x <- tanh(x W) + what belongs to a case, to a layer and to all; each layer tells a sum of every case."""

    def turn(x, item):
        weight, number = item
        x = constrain(jnp.tanh(x @ weight), "batch", "length", None)
        x = x + rows[:, None, None] * shared * (number + 1).astype(jnp.float32)
        return x, jnp.sum(x, axis=(1, 2))

    return jax.lax.scan(turn, x, (weights, numbers))


def scalar(x, told):
    """Something of both results, that depends on every number differently."""
    slopes = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    return jnp.sum(x * slopes) + jnp.sum(told**2)


def arguments(count):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return 0.4 * draw(count, WIDTH, WIDTH), draw(CASES, 2, WIDTH), draw(CASES), jnp.float32(0.1)


def on_a_ring(config, count):
    """Compiled for the mesh: value and gradients; weights are given in the order of the layers."""
    mesh = make_mesh(config)
    decoder = DecoderConfig(num_hidden_layers=count, first_k_dense_replace=0)
    stages = stages_of(decoder, config.pipe, config.interleave)

    def run(weights, x, rows, shared):
        x, told = pipeline(stages, layers, weights[jnp.asarray(stages.order)], x, rows, shared)
        return scalar(x, jnp.sum(told, axis=(1, 2, 3))[jnp.argsort(jnp.asarray(stages.order))])

    both = traced_for(mesh, config, jax.value_and_grad(run, argnums=(0, 1, 2)))
    given = arguments(count)
    whole = NamedSharding(mesh, PartitionSpec())
    return mesh, jax.jit(both, in_shardings=whole).lower(*given).compile(), given


MESHES: list[dict[str, Any]] = [
    {"pipe": 4, "data": 2},
    {"pipe": 2, "data": 2, "tensor": 2, "microbatches": 4},
    {"pipe": 2, "interleave": 2, "data": 4},
    {"pipe": 4, "interleave": 2, "data": 1, "tensor": 2},
    {"pipe": 4, "overlap": True, "data": 2, "microbatches": 4},
    {"pipe": 2, "interleave": 4, "overlap": True, "fsdp": 4},
    {"pipe": 8, "microbatches": 16},
]


@pytest.mark.parametrize("fields", MESHES, ids=str)
def test_a_ring_computes_what_layers_one_after_another_do(fields):
    _, compiled, given = on_a_ring(MeshConfig(**{"data": 1, **fields}), 8)

    def run(weights, x, rows, shared):
        x, told = layers(weights, jnp.arange(8), x, rows, shared)
        return scalar(x, jnp.sum(told, axis=1))

    expected = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2)))(*given)
    for one, other in zip(jax.tree.leaves(compiled(*given)), jax.tree.leaves(expected), strict=True):
        assert np.abs(one - other).max() <= 5e-6 * np.abs(other).max()


@pytest.mark.parametrize("fields", [{"pipe": 4, "data": 2}, {"pipe": 2, "interleave": 2, "data": 4}], ids=str)
def test_what_travels_is_what_the_schedule_says(fields):
    config = MeshConfig(**{"data": 1, **fields})
    mesh, compiled, _ = on_a_ring(config, 8)
    schedule = schedule_of(placement_on(mesh, 0, config).ring, CASES)
    sent = [one for one in collectives(compiled.as_text(), mesh) if one.kind == "collective-permute"]
    part = CASES // schedule.microbatches // config.data * 2 * WIDTH * 4  # bytes of a device's part of a microbatch
    ring = [one for one in sent if one.times > 1]
    assert {one.times for one in ring} == {schedule.ticks}  # a microbatch or its gradient in every tick
    senders = 1.0 if config.interleave > 1 else (config.pipe - 1) / config.pipe
    assert sum(one.wire_bytes for one in ring) == 2 * schedule.ticks * part * senders
    # Into the ring and out of it every case goes once, but those that are there; so do their gradients.
    moved = 4 * schedule.microbatches * part * (config.pipe - 1) / config.pipe / config.pipe
    assert sum(one.wire_bytes for one in sent if one.times == 1 and "ppermute" in one.name) == moved
    sums = [one for one in collectives(compiled.as_text(), mesh) if one.kind == "all-reduce" and "data" in one.axes]
    assert sums and all(one.times == 1 for one in sums), "gradients of weights are summed once, not in every tick"


@pytest.mark.parametrize("overlap", [True, False])
def test_with_overlap_no_product_waits_for_what_travels(overlap):
    _, compiled, _ = on_a_ring(MeshConfig(data=2, pipe=4, overlap=overlap), 8)
    text = compiled.as_text()
    bodies = re.findall(r"^%?[\w.\-]+ [^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    (loop,) = [body for body in bodies if re.search(r'collective-permute\(.*op_name="jit\(run\)/jvp.*while/body', body)]
    lines = [re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)\((.*)", line) for line in loop.splitlines()]
    made = {line[1]: (line[2], re.findall(r"%([\w.\-]+)", line[3])) for line in lines if line}
    (permute,) = [name for name, (kind, _) in made.items() if kind == "collective-permute"]
    moves = {"parameter", "get-tuple-element", "copy", "bitcast", "tuple", "collective-permute"}

    def sources(name):
        kind, inputs = made.get(name, ("", []))
        return {kind}.union(*(sources(one) for one in inputs if one in made))

    def users(name):
        direct = [(user, kind) for user, (kind, inputs) in made.items() if name in inputs]
        return {kind for _, kind in direct}.union(*(users(user) for user, _ in direct))

    assert users(permute) <= moves  # what has arrived is for the next tick
    assert (sources(permute) <= moves) == overlap  # what is sent was made in the last one
