"""A table of where each weight lies (`train.py --mesh.show`), for meshes whose devices need not exist."""

import math
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from r1jax.ops.pipeline import Stages
from r1jax.parallel.mesh import path_name, shard_tree


def show(mesh: Mesh | AbstractMesh, parts: dict[str, Any], stages: Stages | None = None) -> str:
    """Says where each array of some trees lies, and what a device keeps of them.

    Args:
      mesh: Devices.
      parts: Trees of arrays or `jax.ShapeDtypeStruct` by name; the first is printed in full, of the others the sums.
      stages: Layers of a pipeline, which the trees have stacked.

    Returns:
      A table.
    """
    first = next(iter(parts.values()))
    rows = [("weight", "shape", "axes", "on a device", "bytes a device")]
    rows += [
        (path_name(path), _sizes(leaf.shape), _axes(where.spec), _sizes(where.shard_shape(leaf.shape)), f"{own:,}")
        for (path, leaf), where, own in zip(
            jax.tree_util.tree_leaves_with_path(first),
            jax.tree.leaves(shard_tree(mesh, first)),
            bytes_a_device(mesh, first),
            strict=True,
        )
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [_line(row, widths) for row in rows]
    devices = math.prod(mesh.shape.values())
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one"
    if stages is not None:
        lines += ["", *(f"{name}  {layers}" for name, layers in stage_lines(stages))]
    lines += ["", f"{devices} device{'s' if devices > 1 else ''}: {axes}"]
    held = {name: (sum(bytes_a_device(mesh, tree)), _bytes(tree)) for name, tree in parts.items()}
    held["together"] = tuple(map(sum, zip(*held.values(), strict=True)))
    width = max(map(len, held))
    lines += [
        f"{name:<{width}}  {own / 2**20:>12,.1f} MiB a device, {whole / 2**20:>14,.1f} MiB in all, "
        f"{own * devices / max(whole, 1):.3f} times an even share"
        for name, (own, whole) in held.items()
    ]
    return "\n".join(lines)


def stage_lines(stages: Stages) -> list[tuple[str, str]]:
    """Name and layers of each stage of a pipeline, and of what all devices share."""
    runs = [(f"stage {device}", ", ".join(_run(run) for run in stages.of(device))) for device in range(stages.devices)]
    return [*runs, ("all of them", "every other layer, embedding, heads and encoders")]


def _run(layers: range) -> str:
    return f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"


def bytes_a_device(mesh: Mesh | AbstractMesh, tree: Any) -> list[int]:
    """Bytes that one device keeps of each array.

    Args:
      mesh: Devices.
      tree: Arrays or `jax.ShapeDtypeStruct`.

    Returns:
      Bytes in the order of the leaves.
    """
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shard_tree(mesh, tree)), strict=True)
    return [math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, where in leaves]


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _line(row: tuple[str, ...], widths: Iterable[int]) -> str:
    *left, right = zip(row, widths, strict=True)
    return "  ".join([*(cell.ljust(width) for cell, width in left), right[0].rjust(right[1])])


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "1"


def _axes(spec: PartitionSpec) -> str:
    """Axes of each dimension; a dot where it is whole."""
    parts = ["." if part is None else part if isinstance(part, str) else "+".join(part) for part in spec]
    return ", ".join(parts) or "whole"
