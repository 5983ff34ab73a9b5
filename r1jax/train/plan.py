"""What a run would take, from the compiled program, before it starts (`train.py --dry-run`)."""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from r1jax.config import Config
from r1jax.data.source import Source
from r1jax.models.precision import PRECISIONS
from r1jax.models.r1 import R1
from r1jax.parallel.collectives import collectives
from r1jax.parallel.mesh import abstract_mesh, check_model, shard_tree, shares
from r1jax.parallel.show import bytes_a_device, show, stage_lines
from r1jax.parallel.stages import apart, schedule_on, stages_on
from r1jax.tasks.task import Task
from r1jax.train.flops import work_of
from r1jax.train.quantized import is_codes
from r1jax.train.roofline import MEMORY, roofline_rows
from r1jax.train.step import HOST, Batch, abstract_state, compile_step, state_shardings

UNTUNED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options of a program for CPUs that is read and never run: its instructions, bytes and exchanges are the same."""


def example_batch(source: Source, task: Task, batch_size: int) -> Batch:
    """A collated batch of the run's shapes, made of the first case alone.

    Args:
      source: Training cases.
      task: Collation.
      batch_size: Cases a step.

    Returns:
      The batch, on the default device.
    """
    one = task.collate(source.read_batch(np.zeros(1, np.int64)))
    return {k: jnp.asarray(np.repeat(v, batch_size, axis=0)) for k, v in one.items()}


def show_mesh(config: Config, make_task: Callable[[Config], Task]) -> str:
    """Says where the state of a run lies on its mesh, whose devices need not exist.

    Args:
      config: The experiment.
      make_task: The task of a config.

    Returns:
      A table.

    Raises:
      UserError: The mesh does not fit the devices or the model.
    """
    mesh = abstract_mesh(config.mesh, jax.device_count())
    check_model(mesh.shape, config.model)
    config = replace(config, train=replace(config.train, batch_size=1, accumulation=1))
    task = make_task(config)
    model, batch = R1(config.model, task.heads), example_batch(task.source("train"), task, 1)
    state = abstract_state(config, model, task, mesh, batch)
    parts = {"parameters": state.params, "optimizer": state.optimizer, "average": state.ema}
    return show(mesh, parts, stages_on(mesh, config.mesh, config.model.decoder))


def plan(config: Config, model: R1, task: Task, mesh: Mesh, batch: Batch) -> str:
    """Compiles the step ahead of time and says what it takes.

    Args:
      config: The experiment.
      model: The model.
      task: The task.
      mesh: Devices.
      batch: Any collated batch.

    Returns:
      A table: parameters in all and active a token, bytes a device and whether it has them, FLOPs a step as XLA
      counts them and as the model needs them, term by term; of several devices also what they exchange, and how long
      H100s need for it all at least.
    """
    state = abstract_state(config, model, task, mesh, batch)
    simulated = mesh.devices.flat[0].platform == "cpu"
    compiled = compile_step(config, model, task, mesh, batch, UNTUNED if simulated else None)
    cost = compiled.cost_analysis()
    held, working = device_need(config, model, task, mesh, batch, compiled)
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(shard_tree(mesh, state)), strict=True)
    copied = sum(x.size * x.dtype.itemsize * (1 if where.is_fully_replicated else 2) for x, where in leaves)
    parts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params, is_leaf=is_codes):
        name = path[0].key
        parts[name] = parts.get(name, 0) + math.prod(leaf.shape)
    total = sum(parts.values())
    d = config.model.decoder
    idle = (d.n_routed_experts - d.num_experts_per_tok) * 3 * d.hidden_size * d.moe_intermediate_size
    layers = d.num_hidden_layers - d.first_k_dense_replace + d.num_nextn_predict_layers
    work = work_of(config.model, task, batch)
    rows = [
        ("parameters", f"{total:,} ({total - layers * idle:,} active a token)"),
        *((f"  {name}", f"{count:,}") for name, count in parts.items()),
        ("mesh", ", ".join(f"{k} {v}" for k, v in mesh.shape.items() if v > 1) or "one device"),
        ("state a device", f"{held / 2**20:,.1f} MiB"),
        ("batch, temporaries a device", f"{working / 2**20:,.1f} MiB"),
        ("memory of a device", _verdict(held + working, mesh)),
        ("host's memory for a save", f"{copied / 2**20:,.1f} MiB"),
        ("FLOPs a step and device", f"{cost.get('flops', float('nan')):,.0f}"),
        ("FLOPs an example", f"{cost.get('flops', float('nan')) * mesh.size / config.train.batch_size:,.0f}"),
        ("", "(XLA's count: the body of a loop counts once, a call of another library not at all)"),
        ("FLOPs a step, of the model", f"{work.flops:,.0f} (passes x forward; causal attention at half)"),
        *(
            (f"  {term.name}", f"{term.passes} x {term.formula} = {term.passes * term.forward:,.0f}")
            for term in work.terms
        ),
    ]
    if mesh.size > 1:
        dtype = jnp.dtype(PRECISIONS[config.model.precision].compute).name
        told, idle = _pipeline(config, task, mesh, batch, work.flops)
        rows += told
        rows += roofline_rows(collectives(compiled.as_text(), mesh), mesh, work.flops, held, dtype, idle)
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)


def _pipeline(
    config: Config, task: Task, mesh: Mesh, batch: Batch, flops: float
) -> tuple[list[tuple[str, str]], float]:
    """What the plan says of a pipeline, and the time its devices are idle, relative to that of all products."""
    decoder = config.model.decoder
    stages, schedule = stages_on(mesh, config.mesh, decoder), schedule_on(mesh, config)
    if stages is None or schedule is None:
        return [], 0.0
    turns = f"idle in {schedule.hop * (schedule.devices - 1)} of {schedule.ticks} turns, {schedule.bubble:.1%}"
    rows = [("pipeline", f"{schedule.microbatches} microbatches, a device {turns}")]
    rows += [(f"  {name}", layers) for name, layers in stage_lines(stages)]
    count, dense = len(stages.layers), stages.layers[0] < decoder.first_k_dense_replace
    fewer = replace(
        decoder,
        num_hidden_layers=decoder.num_hidden_layers - count,
        first_k_dense_replace=decoder.first_k_dense_replace - (count if dense else 0),
    )
    outside = work_of(replace(config.model, decoder=fewer), task, batch).flops
    return rows, (1 - outside / flops) * schedule.bubble / (1 - schedule.bubble)


def device_need(config: Config, model: R1, task: Task, mesh: Mesh, batch: Batch, compiled: Any) -> tuple[int, int]:
    """Bytes of a device that a step takes, or a save where that takes more: it copies the layers of a pipeline.

    Args:
      config: The experiment.
      model: The model.
      task: The task.
      mesh: Devices.
      batch: Any collated batch (shapes).
      compiled: The step.

    Returns:
      Of the state, less what waits in the host's memory, and of the batch and what the program needs besides.
    """
    state, stages = abstract_state(config, model, task, mesh, batch), stages_on(mesh, config.mesh, config.model.decoder)
    working = compiled.memory_analysis().temp_size_in_bytes + sum(x.nbytes for x in batch.values()) // shares(mesh)
    if stages is not None:
        working = max(working, sum(bytes_a_device(mesh, jax.eval_shape(lambda tree: apart(tree, mesh, stages), state))))
    places = jax.tree.leaves(state_shardings(config, mesh, state))
    held = zip(bytes_a_device(mesh, state), places, strict=True)
    return sum(size for size, where in held if where.memory_kind != HOST), working


def device_limit(mesh: Mesh) -> float | None:
    """Bytes that JAX may use of a GPU, or this host's memory shared by its CPU devices; None where it is unknown."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(mesh.local_devices)
    return (device.memory_stats() or {}).get("bytes_limit")


def _verdict(needed: int, mesh: Mesh) -> str:
    """Whether a step fits; several CPU devices stand for as many H100s."""
    simulated = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    limit = MEMORY if simulated else device_limit(mesh)
    if limit is None:
        return "unknown"
    fits = "the step fits" if needed <= limit else "the step does not fit"
    told = f"{limit / 2**20:,.0f} MiB{' of an H100' if simulated else ''}: {fits}, it takes {needed / limit:.1%}"
    return f"{told} (temporaries as the CPU's compiler plans them)" if simulated else told
