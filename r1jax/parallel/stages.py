"""The layers of a pipeline in a tree: stacked on their devices while a run trains, one by one wherever else it is read.

Checkpoints, evaluation and exports have every layer by itself, each of its weights kept apart over the axis `pipe` too.
Between the two forms every number moves at most once, and no device ever holds more than its share of both.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array

from r1jax.config import Config, DecoderConfig, MeshConfig
from r1jax.ops.axes import axes_of
from r1jax.ops.pipeline import STACKED, Schedule, Stages, schedule_of, stages_of
from r1jax.parallel.mesh import kept_spec, path_name, shard_tree
from r1jax.parallel.rules import placement_on

AXIS, DECODER = "pipe", "decoder"


def stages_on(mesh: Mesh | AbstractMesh, config: MeshConfig, decoder: DecoderConfig) -> Stages | None:
    """Which layers lie where on a mesh.

    Args:
      mesh: Devices.
      config: Runs of layers of a device.
      decoder: The layers.

    Returns:
      The stages; None where all devices have all layers.

    Raises:
      UserError: There are fewer layers than runs of them.
    """
    devices = mesh.shape.get(AXIS, 1)
    return None if devices == 1 else stages_of(decoder, devices, config.interleave)


def schedule_on(mesh: Mesh | AbstractMesh, config: Config) -> Schedule | None:
    """Who computes what when, in each part of a batch.

    Args:
      mesh: Devices.
      config: Batch, and what the mesh's fields say of the schedule.

    Returns:
      The schedule; None without a pipeline.

    Raises:
      UserError: The batch or the layers cannot be divided so.
    """
    stages, where = stages_on(mesh, config.mesh, config.model.decoder), placement_on(mesh, 0, config.mesh)
    if stages is None:
        return None
    assert where is not None and where.ring is not None
    return schedule_of(where.ring, config.train.batch_size // config.train.accumulation)


def stacked(tree: Any, mesh: Mesh | AbstractMesh, stages: Stages | None) -> Any:
    """Stacks the layers of the pipeline, wherever a tree has them.

    Args:
      tree: Parameters, or anything that contains trees like them; traced, or for its shapes alone.
      mesh: Devices.
      stages: Of the pipeline; None gives the tree as it is.

    Returns:
      The tree, in which one entry has taken the place of those of these layers.
    """
    if stages is None:
        return tree
    names = [f"layers_{i}" for i in stages.order]

    def stack(path: str, part: dict[str, Any]) -> dict[str, Any]:
        join = lambda inner, *layers: _exchange(mesh, f"{path}/{path_name(inner)}", layers, together=True)  # noqa: E731
        whole = jax.tree_util.tree_map_with_path(join, *(part[name] for name in names))
        return {name: x for name, x in part.items() if name not in names} | {STACKED: whole}

    return _in_decoders(tree, names[0], stack)


def apart(tree: Any, mesh: Mesh | AbstractMesh, stages: Stages | None) -> Any:
    """Undoes `stacked`."""
    if stages is None:
        return tree

    def split(path: str, part: dict[str, Any]) -> dict[str, Any]:
        one = lambda inner, x: _exchange(mesh, f"{path}/{path_name(inner)}", (x,), together=False)  # noqa: E731
        layers = jax.tree_util.tree_map_with_path(one, part[STACKED])
        is_list = lambda x: isinstance(x, list)  # noqa: E731
        found = {
            f"layers_{number}": jax.tree.map(lambda x, slot=slot: x[slot], layers, is_leaf=is_list)
            for slot, number in enumerate(stages.order)
        }
        return {name: x for name, x in part.items() if name != STACKED} | found

    return _in_decoders(tree, STACKED, split)


def _in_decoders(tree: Any, name: str, change: Callable[[str, dict[str, Any]], dict[str, Any]]) -> Any:
    """Changes every decoder in a tree that has an entry of that name; encoders have layers of the same names."""
    found = lambda part: isinstance(part, dict) and isinstance(part.get(DECODER), dict) and name in part[DECODER]  # noqa: E731

    def visit(path: tuple[Any, ...], part: Any) -> Any:
        if not found(part):
            return part
        above = f"{path_name(path)}/" if path else ""
        return {**part, DECODER: change(f"{above}{DECODER}", part[DECODER])}

    return jax.tree_util.tree_map_with_path(visit, tree, is_leaf=found)


def _exchange(mesh: Mesh | AbstractMesh, path: str, arrays: tuple[Array, ...], *, together: bool) -> Any:
    """Weights of one name: those of all layers become one array, or one array becomes those of all layers."""
    shape = arrays[0].shape if together else arrays[0].shape[1:]
    one = kept_spec(mesh, path, shape)
    where = next((i for i, part in enumerate(one) if AXIS in axes_of(part)), None)
    rest = [tuple(axis for axis in axes_of(part) if axis != AXIS) or None for part in one]
    whole = PartitionSpec(AXIS, *rest)

    def stack(*layers: Array) -> Array:
        x = jnp.stack(layers)
        if where is None:
            count = len(layers) // mesh.shape[AXIS]
            return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXIS) * count, count)
        return jax.lax.all_to_all(x, AXIS, split_axis=0, concat_axis=where + 1, tiled=True)

    def split(x: Array) -> list[Array]:
        if where is None:
            return list(jax.lax.all_gather(x, AXIS, tiled=True))
        return list(jax.lax.all_to_all(x, AXIS, split_axis=where + 1, concat_axis=0, tiled=True))

    function: Callable[..., Any] = stack if together else split
    specs = ((one,) * len(arrays), whole) if together else ((whole,), one)
    return jax.shard_map(function, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)(*arrays)


def into_stages(tree: Any, mesh: Mesh, stages: Stages | None) -> Any:
    """`stacked` of arrays on the devices of a mesh, whose memory it takes over."""
    return tree if stages is None else _moved(stacked, mesh, stages)(tree)


def out_of_stages(tree: Any, mesh: Mesh, stages: Stages | None) -> Any:
    """`apart` of arrays on the devices of a mesh, which stay as they are."""
    return tree if stages is None else _moved(apart, mesh, stages)(tree)


@functools.cache
def _moved(how: Callable[..., Any], mesh: Mesh, stages: Stages) -> Callable[[Any], Any]:
    """The compiled function, which lays everything where the rules want it."""

    def move(tree: Any) -> Any:
        moved = how(tree, mesh, stages)
        return jax.tree.map(jax.lax.with_sharding_constraint, moved, shard_tree(mesh, moved))

    return jax.jit(move, donate_argnums=0 if how is stacked else ())
