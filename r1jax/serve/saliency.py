"""Which voxels of a picture move an output: integrated gradients from air to the picture."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from r1jax.data.source import Source
from r1jax.models.r1 import R1
from r1jax.parallel.mesh import batch_sharding, shard_tree
from r1jax.serve.attribution import integrated_gradients
from r1jax.tasks.medical.schema import FINDING, FINDINGS
from r1jax.tasks.medical.task import Medical

STEPS = 8
AIR = -1.0
"""The lowest value that a model reads: HU -1000."""


def explained_finding(fields: tuple[str, ...]) -> str:
    """The output to explain: the first binary finding of the schema among these, else the first rating, else any."""
    known = [finding for finding in FINDINGS if finding.name in fields]
    return min(known, key=lambda finding: ("binary", "rating", "length", "vector").index(finding.kind)).name


def explained_output(name: str, raw: Float[Array, "B _"]) -> Float[Array, " B"]:
    """One number a case from a head's raw output: logit, expected level, logarithm of the length, or distance."""
    match FINDING[name].kind:
        case "rating":
            return jax.nn.softmax(raw, axis=-1) @ jnp.arange(1.0, raw.shape[-1] + 1)
        case "vector":
            return jnp.linalg.norm(raw, axis=-1)
        case _:
            return raw[:, 0]


def attributions(
    model: R1, task: Medical, params: Any, batch: dict[str, Any], picture: str, steps: int = STEPS
) -> Float[Array, "B ..."]:
    """Signed contribution of each voxel that the model reads to `explained_output`.

    Args:
      model: The model.
      task: Prepares the batch.
      params: Weights.
      batch: From `task.collate`.
      picture: "volume" or "image".
      steps: Points on the way from air to the picture.

    Returns:
      Attributions of the size that the model reads, in units of the output.
    """
    inputs, _ = task.prepare(batch)
    x, name = getattr(inputs, picture), explained_finding(task.fields)

    def output(pixels: Array) -> Array:
        heads = model.apply({"params": params}, inputs._replace(**{picture: pixels})).heads
        return explained_output(name, heads[name])

    return integrated_gradients(output, jnp.full_like(x, AIR), x, steps).contributions


def smooth(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Averages neighbours with weights 1, 2, 1 along each axis but the first."""
    for axis in range(1, x.ndim):
        padded = jnp.pad(x, [(1, 1) if k == axis else (0, 0) for k in range(x.ndim)], mode="edge")
        left, middle, right = (jax.lax.slice_in_dim(padded, k, k + x.shape[axis], axis=axis) for k in range(3))
        x = (left + 2 * middle + right) / 4
    return x


def saliency_maps(
    model: R1, task: Medical, mesh: Mesh, params: Any, source: Source, indices: list[int], picture: str
) -> list[Float[np.ndarray, "..."]]:
    """Maps of chosen cases, of the size of the source's pictures.

    Args:
      model: The model.
      task: The task.
      mesh: Devices.
      params: Weights to serve.
      source: The cases.
      indices: Which of them; at least one.
      picture: "volume" or "image".

    Returns:
      Smoothed size of the attributions of each case; 0 where the model reads nothing.
    """
    filled = np.array(indices + indices[-1:] * (-len(indices) % mesh.size))
    raw = source.read_batch(filled)
    batch = jax.device_put(task.collate(raw), batch_sharding(mesh))
    params = jax.device_put(params, shard_tree(mesh, params))
    found = jax.jit(lambda params, batch: smooth(jnp.abs(attributions(model, task, params, batch, picture))))
    maps = np.asarray(jax.device_get(found(params, batch)))[: len(indices)]
    return [_placed(case, raw[picture].shape[1:]) for case in maps]


def _placed(x: Float[np.ndarray, "..."], shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """Undoes the crop or padding about the centre that brought a picture of `shape` to the size of x."""
    for axis, want in enumerate(shape):
        have = x.shape[axis]
        if have > want:
            start = (have - want) // 2
            x = np.take(x, np.arange(start, start + want), axis=axis)
        else:
            before = (want - have) // 2
            x = np.pad(x, [(before, want - have - before) if k == axis else (0, 0) for k in range(x.ndim)])
    return x
