"""Batches that fit: the largest one, or the fewest parts of a given one, by what compiled steps say they take.

What was found is kept in the run folder, so that a run goes on with the batches that it was started with, and a step
that ran out of memory at run time is not tried again.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from r1jax.config import Config
from r1jax.data.source import Source
from r1jax.disk import flush
from r1jax.errors import UserError
from r1jax.models.r1 import R1
from r1jax.parallel.agree import from_first
from r1jax.parallel.mesh import shares
from r1jax.parallel.stages import schedule_on
from r1jax.tasks.task import Task
from r1jax.train.plan import device_limit, device_need, example_batch
from r1jax.train.step import compile_step

RECORD = "batch.json"
"""File of a run folder: what was found, and for which devices."""
AUTO = "auto"
PROBES = 4, 16
"""Cases a device of the two steps from which the others are foretold."""


def settle_batch(config: Config, mesh: Mesh, task: Task, source: Source, say: Callable[[str], None]) -> Config:
    """Puts numbers where the config says "auto", and takes over what an earlier start of the run found.

    Args:
      config: The experiment.
      mesh: Devices.
      task: The task.
      source: Training cases; no part of a batch is larger.
      say: Prints a line.

    Returns:
      The config with whole numbers as `train.batch_size` and `train.accumulation`.

    Raises:
      UserError: Not even one case a device fits, or the devices do not say what they have.
    """
    train, record, unit = config.train, from_first(lambda: _read(config)), unit_of(config, mesh)
    if record and record["device"] == _device(mesh):
        size = record["batch_size"] if train.batch_size == AUTO else train.batch_size
        parts = record["accumulation"]
        if train.accumulation != AUTO and size == record["batch_size"]:
            parts = max(parts, train.accumulation)
        if size == record["batch_size"] and size % (parts * unit) == 0:
            say(f"batch: {size} cases in {parts} part{'s' if parts > 1 else ''}, as {config.workdir}/{RECORD} has it")
            return _with(config, size, parts)
    if AUTO not in (train.batch_size, train.accumulation):
        return config
    limit = from_first(lambda: device_limit(mesh))
    if limit is None:
        raise UserError(
            f"{_device(mesh)} does not say how much memory it has: give train.batch_size and train.accumulation numbers"
        )
    budget, need = train.memory_share * limit, _needs(config, mesh, task, source)
    if train.batch_size == AUTO and record:  # the run has its batch; on other devices only the parts may differ
        config = _with(config, record["batch_size"], AUTO)
    if config.train.batch_size == AUTO:
        part = largest_part(lambda cases: need(cases, train.accumulation), budget, unit, len(source))
        config = _with(config, part * train.accumulation, train.accumulation)
    else:
        schedule_on(mesh, _with(config, config.train.batch_size, 1))  # what it cannot divide, fewer cases cannot be
        parts = fewest_parts(need, budget, unit, config.train.batch_size)
        config = _with(config, config.train.batch_size, parts)
    size, parts = config.train.batch_size, config.train.accumulation
    took = need(size // parts, parts)
    say(
        f"batch: {size} cases in {parts} part{'s' if parts > 1 else ''}, {took / 2**20:,.0f} MiB of a device "
        f"({took / limit:.1%}; train.memory_share allows {train.memory_share:.1%})"
    )
    return config


def unit_of(config: Config, mesh: Mesh) -> int:
    """Cases of which every part of a batch is a multiple.

    Args:
      config: What the mesh's fields say of a pipeline.
      mesh: Devices.

    Returns:
      One for each device that shares them; where layers are divided, as many as the fewest microbatches take.

    Raises:
      UserError: No number of cases can be divided so.
    """
    devices = shares(mesh)
    most = mesh.size * max(2 * mesh.shape.get("pipe", 1), config.mesh.microbatches or 1)
    for cases in range(devices, most, devices):
        try:
            schedule_on(mesh, _with(config, cases, 1))
        except UserError:
            continue
        return cases
    schedule_on(mesh, _with(config, most, 1))
    return most


def largest_part(need: Callable[[int], float], budget: float, unit: int, cases: int) -> int:
    """Looks for the largest part of a batch that fits: a power of two times what can be divided.

    What a step takes grows about evenly with its cases, so two of them foretell the rest, and the answer is compiled.

    Args:
      need: Bytes of a device for so many cases of a part.
      budget: Bytes that may be taken.
      unit: Cases of which a part is a multiple.
      cases: Training cases; no part is larger.

    Returns:
      Cases.

    Raises:
      UserError: Not even one a device fits.
    """
    small, large = (probe * unit for probe in PROBES)
    at_small, at_large = need(small), need(large)
    slope = max((at_large - at_small) / (large - small), 1.0)
    foretold = max(small + (budget - at_small) / slope, unit)
    size = unit
    while 2 * size <= min(foretold, max(cases, unit)):
        size *= 2
    while 2 * size <= cases and need(2 * size) <= budget:
        size *= 2
    while need(size) > budget:
        if size == unit:
            raise _too_small(need(size), budget)
        size //= 2
    return size


def fewest_parts(need: Callable[[int, int], float], budget: float, unit: int, batch_size: int) -> int:
    """Looks for the fewest parts in which a batch fits.

    Args:
      need: Bytes of a device for (cases of a part, parts).
      budget: Bytes that may be taken.
      unit: Cases of which a part is a multiple: the devices that share it, or more.
      batch_size: Cases of a step.

    Returns:
      A divisor of the batch size.

    Raises:
      UserError: Not even one case a device fits, or the batch cannot be spread over the devices.
    """
    choices = list(divisions(batch_size, unit))
    if not choices:
        raise UserError(f"train.batch_size is {batch_size}, which is no multiple of the {unit} devices of the mesh")
    for parts in choices:
        if need(batch_size // parts, parts) <= budget:
            return parts
    raise _too_small(need(batch_size // choices[-1], choices[-1]), budget)


def divisions(batch_size: int, unit: int) -> Iterator[int]:
    """Numbers of parts that have a multiple of so many cases each, fewest first."""
    return (n for n in range(1, batch_size + 1) if batch_size % n == 0 and batch_size // n % unit == 0)


def in_more_parts(config: Config, mesh: Mesh) -> Config:
    """The config with at least twice as many parts, for a step that ran out of memory; it is kept in the run folder.

    Raises:
      UserError: Every part has as few cases as the devices can divide.
    """
    size, parts = config.train.batch_size, config.train.accumulation
    more = next((n for n in divisions(size, unit_of(config, mesh)) if n >= 2 * parts), None)
    if more is None:
        raise UserError(
            f"a step of {size} cases in {parts} parts takes more memory than {_device(mesh)} has: choose model.remat, "
            "a smaller model or more devices (--mesh.fsdp); what was saved is untouched"
        )
    config = _with(config, size, more)
    keep(config, mesh)
    return config


def keep(config: Config, mesh: Mesh) -> None:
    """Writes down the batch of a run, for its next start."""
    file = Path(config.workdir) / RECORD
    content = {
        "device": _device(mesh),
        "batch_size": config.train.batch_size,
        "accumulation": config.train.accumulation,
    }
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps(content) + "\n")
    flush(draft)
    os.replace(draft, file)


def _read(config: Config) -> dict[str, Any] | None:
    file = Path(config.workdir) / RECORD
    try:
        record = json.loads(file.read_text())
        return {name: record[name] for name in ("device", "batch_size", "accumulation")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}): delete it, and give train.batch_size a number") from None


def _device(mesh: Mesh) -> str:
    """The devices, and how the work is divided where they do not just share the cases: a batch that fits is of both."""
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1 and axis != "data")
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}{f' ({axes})' if axes else ''}"


def _with(config: Config, batch_size: int | str, accumulation: int | str) -> Config:
    return replace(config, train=replace(config.train, batch_size=batch_size, accumulation=accumulation))


def _too_small(need: float, budget: float) -> UserError:
    return UserError(
        f"not even one case a device fits: a step takes {need / 2**20:,.0f} MiB, may take {budget / 2**20:,.0f} MiB "
        "(train.memory_share): choose model.remat, a smaller model or more devices (--mesh.fsdp)"
    )


def _needs(config: Config, mesh: Mesh, task: Task, source: Source) -> Callable[[int, int], float]:
    """Bytes that a device needs for a step of so many cases a part and parts; each is compiled once."""
    known: dict[tuple[int, int], float] = {}

    def need(cases: int, parts: int) -> float:
        if (cases, parts) not in known:
            tried = _with(config, cases * parts, parts)
            model, batch = R1(tried.model, task.heads), example_batch(source, task, cases * parts)
            try:
                compiled = compile_step(tried, model, task, mesh, batch)
                took = float(sum(device_need(tried, model, task, mesh, batch, compiled)))
            except jax.errors.JaxRuntimeError as error:  # some compilers refuse what cannot fit
                if not out_of_memory(error):
                    raise
                took = float("inf")
            known[cases, parts] = from_first(lambda: took)  # the tuning of each process may differ a little
        return known[cases, parts]

    return need


def out_of_memory(error: Exception) -> bool:
    """Whether a device, or the compiler on its behalf, had too little memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
