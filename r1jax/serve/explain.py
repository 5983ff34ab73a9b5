"""Contributions of everything that the finance task reads to the log-odds of fraud, by integrated gradients.

The way begins at a typical transaction: the mean features of some that the model finds least suspicious. Tokens and
states have no gradient themselves; their features have (`r1jax/models/features.py`). All the way each token is read by
the experts that it has at the transaction, since no gradient sees the jump of the score where a token changes them.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from r1jax.data.source import Source
from r1jax.models.features import Features, read_from, record, record_experts
from r1jax.models.r1 import R1
from r1jax.models.series import STATES
from r1jax.parallel.mesh import batch_sharding, shard_tree
from r1jax.serve.attribution import integrated_gradients
from r1jax.serve.progress import progress
from r1jax.tasks.finance.reasons import Contributions
from r1jax.tasks.finance.task import Finance

STEPS = 64
"""Points on the way."""
FINER = 8
"""Times as many for a transaction whose contributions do not add up."""
TYPICAL = 256
"""Transactions that the way's beginning is the mean of."""
BATCH = 32


class Explainer:
    """Compiles what one model needs for its reasons, once."""

    def __init__(self, model: R1, task: Finance, params: Any, steps: int) -> None:
        """Compiles nothing yet.

        Args:
          model: The model.
          task: Prepares batches.
          params: Weights to serve.
          steps: Points on the way.
        """
        self.params, self.steps = params, steps
        # With the same weights; `record_experts` sees into no loop and no rematerialisation.
        model = model.clone(config=dataclasses.replace(model.config, remat="none", scan_layers=False))
        self.sums = jax.jit(lambda p, batch: _reference_sums(model, task, p, batch))
        self.contributions = jax.jit(
            lambda p, batch, start, offset: _contributions(model, task, p, batch, start, offset, steps)
        )

    def typical(self, batches: Iterable[dict[str, Any]]) -> dict[str, Array]:
        """Mean features: by event of each stream, over all tokens of the texts, by column of the table.

        Args:
          batches: Collated, of one size.

        Returns:
          Where ways begin.
        """
        total = None
        for batch in batches:
            here = self.sums(self.params, batch)
            total = here if total is None else jax.tree.map(jnp.add, total, here)
        means = {}
        for name, (values, count) in total.items():
            everywhere = values.sum(axis=0, keepdims=True) / jnp.maximum(count.sum(axis=0, keepdims=True), 1)
            means[name] = jnp.where(count > 0, values / jnp.maximum(count, 1), everywhere)
        return means

    def explain(self, batch: dict[str, Any], start: dict[str, Any], offsets: int = 1) -> Contributions:
        """What each input adds.

        Args:
          batch: Collated.
          start: From `typical`.
          offsets: Shifts of the points; the mean over them is that of so many times the steps.

        Returns:
          Of every case of the batch.
        """
        total = None
        for i in range(offsets):
            shift = np.float32((i + 0.5) / offsets)
            part = jax.device_get(self.contributions(self.params, batch, start, shift))
            total = part if total is None else [x + y for x, y in zip(total, part, strict=True)]
        return Contributions(*(np.asarray(x).astype(np.float64) / offsets for x in total))


def explain(
    model: R1, task: Finance, mesh: Mesh, params: Any, source: Source, indices: np.ndarray, typical: np.ndarray
) -> Contributions:
    """Explains chosen transactions.

    Args:
      model: The model.
      task: Prepares batches.
      mesh: Devices.
      params: Weights to serve.
      source: The transactions.
      indices: Which to explain; at least one.
      typical: Which the baseline is made of; at least one.

    Returns:
      What each input adds, in the order of `indices`.
    """
    explainer = Explainer(model, task, jax.device_put(params, shard_tree(mesh, params)), STEPS)
    size = -(-BATCH // mesh.size) * mesh.size

    def read(chosen: np.ndarray) -> dict[str, Array]:
        filled = np.append(chosen, np.repeat(chosen[-1:], size - len(chosen)))
        return jax.device_put(task.collate(source.read_batch(filled)), batch_sharding(mesh))

    whole = typical[: max(len(typical) // size * size, min(len(typical), size))]  # a filled-up batch repeats its last
    start = explainer.typical(read(whole[first : first + size]) for first in range(0, len(whole), size))

    def all_of(chosen: np.ndarray, offsets: int, name: str) -> Contributions:
        parts = []
        with progress(name, len(chosen)) as steps:
            for first in range(0, len(chosen), size):
                here = chosen[first : first + size]
                found = explainer.explain(read(here), start, offsets)
                parts.append(Contributions(*(x[: len(here)] for x in found)))
                steps.advance(len(here))
        return Contributions(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    found = all_of(indices, 1, "reasons")
    rough = np.flatnonzero(~found.complete)
    if len(rough):
        finer = all_of(indices[rough], FINER, "reasons in finer steps")
        for whole, part in zip(found, finer, strict=True):
            whole[rough] = part
    return found


def _reference_sums(model: R1, task: Finance, params: Any, batch: dict[str, Array]) -> dict[str, tuple[Array, Array]]:
    """Sums of the features over a batch, and over how many; a position is an event, a token or all of the table."""
    inputs, _ = task.prepare(batch)
    sums = {}
    for name, x in record(model, params, inputs).items():
        match name:
            case "text":
                valid = inputs.text_valid
            case "ngrams":
                valid = jnp.any(inputs.text_valid, axis=1, keepdims=True)
            case _:
                valid = inputs.series_valid[:, int(name.removeprefix("stream_"))]
        axes = (0, 1) if name == "text" else (0,)
        sums[name] = _sums(x, valid[..., None], axes)
    if inputs.table is not None:
        sums["table"] = _sums(inputs.table, ~jnp.isnan(inputs.table), (0,))
    return sums


def _sums(x: Array, valid: Bool[Array, "..."], axes: tuple[int, ...]) -> tuple[Array, Array]:
    valid = jnp.broadcast_to(valid, x.shape)
    values = jnp.sum(jnp.where(valid, x, 0), axis=axes, dtype=jnp.float32)
    count = jnp.sum(valid, axis=axes, dtype=jnp.float32)
    return (values[None], count[None]) if values.ndim == 1 else (values, count)


def _contributions(
    model: R1,
    task: Finance,
    params: Any,
    batch: dict[str, Array],
    start: dict[str, Array],
    offset: Float[Array, ""],
    steps: int,
) -> tuple[Float[Array, "B F"], Float[Array, "B S K C"], Float[Array, "B T"], Float[Array, " B"], Float[Array, " B"]]:
    """The fields of `Contributions` for a batch."""
    inputs, _ = task.prepare(batch)
    end = {name: x.astype(jnp.float32) for name, x in record(model, params, inputs).items()}
    if inputs.table is not None:
        end["table"] = inputs.table
    experts = record_experts(model, params, inputs)
    begin = {
        name: jnp.broadcast_to(start[name] if x.ndim == 2 else start[name][None], x.shape) for name, x in end.items()
    }
    if "ngrams" in end:  # where there is no note, there is nothing to be said
        noted = jnp.any(inputs.text_valid, axis=1)[:, None, None]
        begin["ngrams"] = jnp.where(noted, begin["ngrams"], end["ngrams"])

    def output(x: Features) -> Float[Array, " B"]:
        shown = inputs if inputs.table is None else inputs._replace(table=x["table"])
        return read_from(model, params, shown, x, experts).heads["fraud"][:, 0] + task.correction  # as the score has it

    found = integrated_gradients(output, begin, end, steps, offset)
    cases, parts = len(batch["target.fraud"]), found.contributions
    nothing = jnp.zeros((cases, 0), jnp.float32)
    channels = inputs.series.shape[-1]
    streams = [parts[f"stream_{i}"] for i in range(inputs.series.shape[1])]
    events = jnp.stack([_by_channel(x, channels) for x in streams], axis=1)
    text = jnp.sum(parts["text"], axis=-1) if "text" in parts else nothing
    if "ngrams" in parts:
        text = text.at[:, 0].add(jnp.sum(parts["ngrams"], axis=(1, 2)))
    return parts.get("table", nothing), events, text, found.baseline, found.output


def _by_channel(x: Float[Array, "B K I"], channels: int) -> Float[Array, "B K C"]:
    """Adds up what belongs to each number of an event: itself, its pieces; and last the states of the label."""
    numbers, pieces, states = jnp.split(x, [channels, x.shape[-1] - STATES], axis=-1)
    pieces = pieces.reshape(*x.shape[:-1], channels, -1)
    return jnp.concatenate([numbers + pieces.sum(axis=-1), states.sum(axis=-1, keepdims=True)], axis=-1)
