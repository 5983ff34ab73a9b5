"""The device mesh, and where parameters and batches live on it."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.backend import clear_backends
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from r1jax.config import DecoderConfig, MeshConfig, ModelConfig
from r1jax.errors import UserError
from r1jax.ops.axes import placed
from r1jax.parallel.rules import AXES, DIMENSIONS, placement_on, present, weight_spec

SMALLEST_SHARDED = 2**16
"""Arrays of fewer numbers stay whole on every device: moving them costs more than keeping them."""


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Devices along each axis, outermost first.

    Args:
      config: Sizes; -1 takes the devices that are left.
      devices: How many there are.

    Returns:
      Sizes whose product is the number of devices.

    Raises:
      UserError: They do not multiply to it.
    """
    sizes = dict(zip(AXES, _sizes(config), strict=True))
    fixed = math.prod(n for n in sizes.values() if n > 0)
    free = [name for name, n in sizes.items() if n == -1]
    if len(free) == 1 and fixed and devices % fixed == 0:
        sizes[free[0]] = devices // fixed
    if any(n < 1 for n in sizes.values()) or math.prod(sizes.values()) != devices:
        told = ("data", "fsdp", *(name for name in ("tensor", "expert", "sequence", "pipe") if sizes[name] != 1))
        product = " x ".join(f"mesh.{name} {getattr(config, name)}" for name in told)
        raise UserError(
            f"{product} does not fit {devices} device(s): the product must be the number of devices, and one size may "
            "be -1"
        )
    return sizes


def _sizes(config: MeshConfig) -> tuple[int, ...]:
    return tuple(getattr(config, name) for name in AXES)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices so that neighbours along the inner axes share a node.

    Args:
      config: Sizes; -1 takes the devices that are left.
      devices: Of all processes; None takes all that JAX finds.

    Returns:
      The mesh, with all axes, those of size 1 too.

    Raises:
      UserError: The sizes do not multiply to the number of devices.
    """
    found = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(found))
    grid = np.empty(len(found), object)
    grid[:] = by_node(found)
    return Mesh(grid.reshape(tuple(sizes.values())), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def by_node(devices: Sequence[Any]) -> list[Any]:
    """Devices in the order of their nodes.

    A process has devices of one node, and processes of a node follow each other: laid out in this order, an axis leaves
    a node only where those within it have used up its devices.

    Args:
      devices: JAX devices, in any order.

    Returns:
      The same devices.
    """
    return sorted(devices, key=lambda d: (getattr(d, "slice_index", None) or 0, d.process_index, d.id))


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """The mesh of a config whose devices need not exist: enough to say what lies where.

    Args:
      config: Sizes; -1 takes the devices that are left, or is 1 where the other sizes need others than are there.
      devices: How many are there.

    Returns:
      The mesh.
    """
    asked = math.prod(n for n in _sizes(config) if n > 0)
    sizes = mesh_sizes(config, devices if devices % asked == 0 and -1 in _sizes(config) else asked)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def planned_mesh(config: MeshConfig) -> Mesh:
    """The mesh of a config for a program that is compiled and never run.

    Args:
      config: Sizes, as for `abstract_mesh`.

    Returns:
      A mesh of the devices that are there, or of as many CPU devices as are asked for; arrays made before are lost.
    """
    count = abstract_mesh(config, jax.device_count()).size
    if count != jax.device_count():
        clear_backends()
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    return make_mesh(config)


def shard_tree(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """Chooses a sharding for each array of a parameter or optimizer tree by the rules of `parallel.rules`.

    Args:
      mesh: From `make_mesh`.
      tree: Arrays or `jax.ShapeDtypeStruct`; moments and averages carry the path of their weight at its end.

    Returns:
      A tree of `NamedSharding`.
    """

    def choose(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, kept_spec(mesh, path_name(path), leaf.shape))

    return jax.tree_util.tree_map_with_path(choose, tree)


def kept_spec(mesh: Mesh | AbstractMesh, path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """Where an array of a tree is kept between steps; its path has slashes."""
    return weight_spec(path, shape, mesh.shape, smallest=SMALLEST_SHARDED)


def path_name(path: tuple[Any, ...]) -> str:
    """A path of `jax.tree_util` with slashes; a key may itself be a tuple of names."""
    keys = (getattr(part, "key", None) for part in path)
    return "/".join(
        "/".join(key) if isinstance(key, tuple) else jax.tree_util.keystr((part,), simple=True)
        for part, key in zip(path, keys, strict=True)
    )


def traced_for(mesh: Mesh | AbstractMesh, config: MeshConfig, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose dimensions have the meaning of a mesh wherever it is traced.

    Args:
      mesh: Devices.
      config: Capacity of the experts' exchange.
      function: To be compiled.

    Returns:
      The same function of the same arguments.
    """

    @functools.wraps(function)
    def traced(*arguments: Any) -> Any:
        with placed(placement_on(mesh, SMALLEST_SHARDED, config)):
            return function(*arguments)

    return traced


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Cases spread over pipe, data, fsdp and expert."""
    return NamedSharding(mesh, PartitionSpec(tuple(axis for axis in DIMENSIONS["batch"] if axis in mesh.shape)))


def shares(mesh: Mesh | AbstractMesh) -> int:
    """Parts into which a batch is divided; devices along the other axes work on the same cases."""
    return math.prod(mesh.shape.get(axis, 1) for axis in DIMENSIONS["batch"])


def check_batch(mesh: Mesh | AbstractMesh, batch_size: int, accumulation: int = 1) -> None:
    """Refuses a batch that cannot be spread evenly.

    Raises:
      UserError: A part of the batch is no multiple of the devices that share it.
    """
    count = shares(mesh)
    if batch_size // accumulation % count:
        part = f", {batch_size // accumulation} in each of {accumulation} parts" if accumulation > 1 else ""
        axes = " x ".join(present(DIMENSIONS["batch"], mesh.shape))
        raise UserError(
            f"train.batch_size is {batch_size}{part}, which is no multiple of the {count} devices of the mesh that "
            f"share it ({axes})"
        )


def check_model(sizes: Mapping[str, int], config: ModelConfig) -> None:
    """Refuses a decoder whose dimensions cannot be divided evenly over the axes that are asked for.

    The encoders are small: what does not divide there stays whole.

    Args:
      sizes: Devices along each mesh axis.
      config: The model.

    Raises:
      UserError: Names the axis, the field and its value.
    """
    for axis, fields in (("tensor", tensor_fields(config.decoder)), ("expert", ("n_routed_experts",))):
        for name in fields:
            size, count = getattr(config.decoder, name), sizes.get(axis, 1)
            if size % count:
                raise UserError(
                    f"mesh.{axis} is {count}, but model.decoder.{name} is {size}: it must be a multiple of mesh.{axis}"
                )


def tensor_fields(decoder: DecoderConfig) -> tuple[str, ...]:
    """Fields of the decoder that lie along the axis `tensor`."""
    mixture = decoder.num_hidden_layers > decoder.first_k_dense_replace or decoder.num_nextn_predict_layers
    return (
        "num_attention_heads",
        "vocab_size",
        *(("intermediate_size",) if decoder.first_k_dense_replace else ()),
        *(("moe_intermediate_size",) if mixture else ()),
    )
