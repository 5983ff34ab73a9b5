"""Names of dimensions, by which models and numerics say how they may be spread; a mesh gives the names their meaning.

Without a placement, which is the case on one device, every function here returns its argument.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array


@dataclass(frozen=True)
class Placement:
    """What the names mean on a mesh."""

    mesh: Mesh | AbstractMesh
    axes: Mapping[str, tuple[str, ...]]
    """Mesh axes of each name, only those of more than one device."""
    weight: Callable[[tuple[str, ...], tuple[int, ...]], tuple[PartitionSpec, PartitionSpec]]
    """From a weight's path and shape: how it is kept, and how products use it."""
    capacity: float
    """Rows that a device may send another for its experts in one round, as a multiple of the even share."""
    ring: "Ring | None" = None
    """Devices that have different layers, where there are any."""

    def devices(self, name: str) -> int:
        """Over how many devices the dimension is spread."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes.get(name, ()))

    def all_axes(self) -> tuple[str, ...]:
        """Axes of more than one device that no enclosing `shard_map` has taken."""
        _, free = _mesh()
        return tuple(axis for axis, size in self.mesh.shape.items() if size > 1 and axis in free)

    def kept(
        self, shape: tuple[int, ...], names: tuple[str | None, ...], path: tuple[str, ...]
    ) -> tuple[PartitionSpec, tuple[tuple[str, ...], ...]]:
        """Where a weight goes into `spread`, and over which axes its function gathers each dimension.

        Args:
          shape: Of the weight; where it has one dimension more than in the parameter tree, the second of them is new.
          names: Of its dimensions.
          path: Of the weight.

        Returns:
          A specification, and axes to be gathered within it.
        """
        used = self.spec(names, shape)
        flat = (shape[0], *shape[2:]) if len(shape) > 3 else shape
        stored = list(self.weight(path, flat)[0])
        stored += [None] * (len(flat) - len(stored))
        if len(shape) > 3:
            stored.insert(1, None)
        extra = tuple(
            tuple(axis for axis in axes_of(kept) if axis not in axes_of(use))
            for kept, use in zip(stored, used, strict=True)
        )
        whole = PartitionSpec(*((*axes_of(use), *more) or None for use, more in zip(used, extra, strict=True)))
        return whole, extra

    def spec(self, names: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """Where an array of these dimensions lies; a dimension that cannot be divided evenly stays whole."""
        parts = []
        for name, size in zip(names, shape, strict=True):
            divides = name is not None and name in self.axes and size % self.devices(name) == 0
            parts.append(self.axes[name] if divides else None)
        return PartitionSpec(*parts)


@dataclass(frozen=True)
class Ring:
    """Devices of an axis along which layers lie; outside of these layers it is one more axis of the batch."""

    axis: str
    repeated: tuple[str, ...]
    """Axes of other cases with the same layers: gradients are summed along them once, after the last turn."""
    devices: int
    rounds: int
    """Runs of layers that each of them has."""
    microbatches: int | None
    """Parts of a batch that travel; None lets the batch decide."""
    hop: int
    """Ticks from one device to the next, as in `pipeline.Schedule`."""
    inside: Placement
    """What the names mean to a device of the ring: these axes are in use."""


_PLACEMENT: ContextVar[Placement | None] = ContextVar("placement", default=None)


def placement() -> Placement | None:
    """The placement for which a program is being traced, or None on one device."""
    return _PLACEMENT.get()


@contextlib.contextmanager
def placed(where: Placement | None) -> Iterator[None]:
    """Gives the names their meaning while a program is traced."""
    token = _PLACEMENT.set(where)
    try:
        yield
    finally:
        _PLACEMENT.reset(token)


def constrain(x: Array, *names: str | None) -> Array:
    """Says where an activation lies.

    Args:
      x: Any array.
      names: Of its dimensions; None is never spread.

    Returns:
      The array.
    """
    where = _PLACEMENT.get()
    return x if where is None else _lay(x, where.spec(names, x.shape))


def gathered(weight: Array, path: tuple[str, ...]) -> Array:
    """A weight as products use it: parts that are kept apart only to save memory come together.

    Cast it first, so that narrow numbers travel. Its gradient goes back to the parts.

    Args:
      weight: Of the parameter tree.
      path: Its names in the tree, or the last of them.

    Returns:
      The weight.
    """
    where = _PLACEMENT.get()
    if where is None:
        return weight
    kept, used = where.weight(path, weight.shape)
    return weight if kept == used else _gather(weight, kept, used)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight: Array, kept: PartitionSpec, used: PartitionSpec) -> Array:
    return _lay(_lay(weight, kept), used)


def _gather_forward(weight: Array, kept: PartitionSpec, used: PartitionSpec) -> tuple[Array, None]:
    return _gather(weight, kept, used), None


def _gather_backward(kept: PartitionSpec, used: PartitionSpec, _: None, gradient: Array) -> tuple[Array]:
    del used
    return (_lay(gradient, kept),)


_gather.defvjp(_gather_forward, _gather_backward)


def gather_dimensions(weight: Array, axes: tuple[tuple[str, ...], ...]) -> Array:
    """Within `spread`: brings together the parts of each dimension.

    In the backward pass each part's gradient is summed where that part is kept.

    Args:
      weight: This device's part.
      axes: Over which mesh axes each dimension is gathered.

    Returns:
      The weight.
    """
    for dimension, over in enumerate(axes):
        if over:
            weight = jax.lax.all_gather(weight, over, axis=dimension, tiled=True)
    return weight


def spread(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Runs a function on each device with that device's part of its arguments; it says itself what is exchanged.

    Args:
      function: Of local arrays.
      in_specs: Where each argument lies; an axis that is not named has the same on all its devices.
      out_specs: Where each result lies.

    Returns:
      A function of whole arrays.
    """
    mesh, free = _mesh()
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=free, check_vma=False)


def axes_of(part: Any) -> tuple[str, ...]:
    """Mesh axes of one dimension of a specification."""
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def _mesh() -> tuple[Mesh | AbstractMesh, set[str]]:
    """The mesh, and its axes that no enclosing `shard_map` has taken."""
    where = _PLACEMENT.get()
    assert where is not None
    inner = jax.sharding.get_abstract_mesh()
    mesh = where.mesh if inner.empty else inner
    return mesh, set(mesh.axis_names) - set(inner.manual_axes)


def _lay(x: Array, spec: PartitionSpec) -> Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(_mesh()[0], spec))
