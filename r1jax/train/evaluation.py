"""What a task scores of every case of a source, in each of the ways to show a case."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r1jax.data.loader import Share, padded_batches
from r1jax.data.source import Source
from r1jax.models.r1 import R1
from r1jax.parallel.agree import place_share, share_of, whole_rows
from r1jax.parallel.mesh import shard_tree, shares, traced_for
from r1jax.tasks.task import Task


class Evaluator:
    """Compiles the forward pass once and scores as many sources as one likes."""

    def __init__(self, model: R1, task: Task, mesh: Mesh, after_batch: Callable[[], object] | None = None) -> None:
        """Prepares the compiled forward pass.

        Args:
          model: The model.
          task: The task.
          mesh: Devices.
          after_batch: Called whenever a batch is scored.
        """
        self.task, self.mesh, self.after_batch = task, mesh, after_batch

        def forward(params: Any, batch: dict[str, Any], mode: Any) -> dict[str, Any]:
            return task.outcomes(functools.partial(model.apply, {"params": params}), batch, mode)

        self.forward = jax.jit(
            traced_for(mesh, task.config.mesh, forward), out_shardings=NamedSharding(mesh, PartitionSpec())
        )

    def predict(
        self, params: Any, source: Source, *, batch_size: int, modes: tuple[str, ...]
    ) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray], list[str]]:
        """Runs over a source in order; of several processes each reads its part, and all get everything.

        Args:
          params: Weights to serve.
          source: The cases.
          batch_size: Cases a forward pass; rounded up to a multiple of the devices that share it.
          modes: Names of the task's modes, in turn.

        Returns:
          Outcomes of each mode (cases first), targets, case ids.
        """
        batch_size = -(-batch_size // shares(self.mesh)) * shares(self.mesh)
        share = Share(*share_of(self.mesh, batch_size))
        params = jax.device_put(params, shard_tree(self.mesh, params))
        predicted: dict[str, list[dict[str, np.ndarray]]] = {mode: [] for mode in modes}
        switches = self.task.modes()
        targets: list[dict[str, np.ndarray]] = []
        ids: list[str] = []
        for indices, batch, raw in padded_batches(source, self.task.collate, batch_size=batch_size, share=share):
            ids += list(raw["case_id"])
            targets.append({k.removeprefix("target."): v for k, v in batch.items() if k.startswith("target.")})
            placed = jax.tree.map(lambda x: place_share(self.mesh, x, batch_size), batch)
            for mode in modes:
                found = jax.device_get(self.forward(params, placed, switches[mode]))
                predicted[mode].append({k: np.asarray(v)[: len(indices)] for k, v in found.items()})
            if self.after_batch is not None:
                self.after_batch()
        whole = {k: whole_rows(self.mesh, v, batch_size)[: len(source)] for k, v in _join(targets).items()}
        if share.count > 1:
            ids = whole_rows(self.mesh, np.asarray(ids), batch_size).tolist()
        return {mode: _join(parts) for mode, parts in predicted.items()}, whole, ids[: len(source)]


def _join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
