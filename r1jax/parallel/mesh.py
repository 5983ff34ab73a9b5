"""The device mesh, and where parameters and batches live on it."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from r1jax.config import MeshConfig
from r1jax.errors import UserError

BATCH = PartitionSpec(("data", "fsdp"))
SMALLEST_SHARDED = 2**16
"""Arrays of fewer numbers stay whole on every device: moving them costs more than keeping them."""


def make_mesh(config: MeshConfig) -> Mesh:
    """Arranges all devices as (data, fsdp).

    Args:
      config: Sizes; -1 takes the devices that are left.

    Returns:
      The mesh.

    Raises:
      UserError: The sizes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    sizes = {"data": config.data, "fsdp": config.fsdp}
    fixed = int(np.prod([n for n in sizes.values() if n > 0]))
    free = [name for name, n in sizes.items() if n == -1]
    if len(free) == 1 and devices % fixed == 0:
        sizes[free[0]] = devices // fixed
    if any(n < 1 for n in sizes.values()) or int(np.prod(list(sizes.values()))) != devices:
        raise UserError(
            f"mesh.data {config.data} x mesh.fsdp {config.fsdp} does not fit {devices} device(s): "
            "the product must be the number of devices, and one size may be -1"
        )
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def shard_tree(mesh: Mesh, tree: Any) -> Any:
    """Chooses a sharding for each array of a parameter or optimizer tree: its largest divisible axis over `fsdp`.

    Stacked experts are no exception: cut along the axis of experts, XLA has each device compute the blocks of all
    tokens, four times the work of a step where it was tried (32 experts, eight devices).

    Args:
      mesh: From `make_mesh`.
      tree: Arrays or `jax.ShapeDtypeStruct`.

    Returns:
      A tree of `NamedSharding`.
    """
    size = mesh.shape["fsdp"]

    def choose(leaf: Any) -> NamedSharding:
        axes = [i for i, n in enumerate(leaf.shape) if n % size == 0]
        if size == 1 or leaf.size < SMALLEST_SHARDED or not axes:
            return NamedSharding(mesh, PartitionSpec())
        widest = max(axes, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, PartitionSpec(*["fsdp" if i == widest else None for i in range(widest + 1)]))

    return jax.tree.map(choose, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Cases spread over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def check_batch(mesh: Mesh, batch_size: int, accumulation: int = 1) -> None:
    """Refuses a batch that cannot be spread evenly.

    Raises:
      UserError: A part of the batch is no multiple of the number of devices.
    """
    if batch_size // accumulation % mesh.size:
        part = f", {batch_size // accumulation} in each of {accumulation} parts" if accumulation > 1 else ""
        raise UserError(
            f"train.batch_size is {batch_size}{part}, which is no multiple of the {mesh.size} devices of the mesh"
        )
