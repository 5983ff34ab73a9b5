"""Which dimension of which array lies along which mesh axis: two tables, and the functions that read them."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from r1jax.config import MeshConfig
from r1jax.ops.axes import Placement, Ring
from r1jax.ops.pipeline import STACKED

AXES = ("pipe", "data", "fsdp", "expert", "sequence", "tensor")
"""Mesh axes from the outermost, whose neighbours are in other nodes, to the innermost, whose neighbours share one."""

DIMENSIONS: dict[str, tuple[str, ...]] = {
    "batch": ("pipe", "data", "fsdp", "expert"),
    "length": ("sequence",),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "vocabulary": ("tensor",),
    "experts": ("expert",),
}
"""Mesh axes of each named dimension; outside the experts, the devices of `expert` share the batch, and outside the
layers of the pipeline those of `pipe`."""

KEPT = ("fsdp", "expert", "sequence")
"""Axes over which the largest dimension of a weight that is left is kept apart, and gathered before use; those that a
dimension lies along already do not count. `pipe` comes after them, on any dimension that it divides: so a weight moves
between the stacked layers of a device and the same layers apart by one exchange along this axis."""

WEIGHTS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"experts/gate_up_proj$", ("experts", "hidden", "kept")),
    (r"experts/down_proj$", ("experts", "kept", "hidden")),
    (r"(embed_tokens|lm_head/weight)$", ("vocabulary", None)),
    (r"(q_b_proj|q_proj|kv_b_proj|qkv_proj)/(weight|lora_b)$", ("heads", None)),
    (r"o_proj/(weight|lora_a)$", (None, "heads")),
    (r"(gate_proj|up_proj)/(weight|lora_b)$", ("hidden", None)),
    (r"down_proj/(weight|lora_a)$", (None, "hidden")),
)
"""Dimensions of the weights, by the end of their path; the first pattern that is found counts.

Linear weights are [out, in]; "kept" is the dimension that is kept apart if it can be, otherwise the largest. Whatever
is not listed (norms, biases, convolutions, latent projections, routers, heads) is only kept apart. Moments and averages
end in the path of their weight.
"""


def weight_spec(
    path: str, shape: tuple[int, ...], sizes: Mapping[str, int], *, kept: bool = True, smallest: int = 0
) -> PartitionSpec:
    """Where a weight lies.

    Args:
      path: Names in the tree, with slashes.
      shape: Of the whole array.
      sizes: Devices along each mesh axis.
      kept: As it is kept between steps; False is as products use it.
      smallest: Arrays of fewer numbers stay whole.

    Returns:
      Mesh axes of each dimension; one that cannot be divided evenly stays whole.
    """
    if STACKED in path.split("/"):
        inner = weight_spec(
            path.replace(f"{STACKED}/", ""), shape[1:], {**sizes, "pipe": 1}, kept=kept, smallest=smallest
        )
        return PartitionSpec(*present(("pipe",), sizes) or (None,), *inner)
    if math.prod(shape) < smallest:
        return PartitionSpec()
    names = next((names for pattern, names in WEIGHTS if re.search(pattern, path)), ())
    parts: list[tuple[str, ...]] = [()] * len(shape)
    for i, name in enumerate(names[: len(shape)]):
        axes = present(DIMENSIONS.get(name, ()), sizes) if name else ()
        parts[i] = axes if shape[i] % _product(axes, sizes) == 0 else ()
    if kept:
        used = {axis for part in parts for axis in part}
        wanted = names.index("kept") if "kept" in names else None
        _keep_apart(parts, shape, tuple(axis for axis in present(KEPT, sizes) if axis not in used), sizes, wanted)
        _keep_apart(parts, shape, present(("pipe",), sizes), sizes, wanted)
    while parts and not parts[-1]:
        parts.pop()
    return PartitionSpec(*(part[0] if len(part) == 1 else part or None for part in parts))


def _keep_apart(
    parts: list[tuple[str, ...]],
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    sizes: Mapping[str, int],
    wanted: int | None,
) -> None:
    """Puts as many of the axes as divide it on the dimension that is wanted, the largest free one, or any other."""
    for count in range(len(axes), 0, -1):
        for free in (True, False):
            fits = [
                i
                for i, n in enumerate(shape)
                if (not parts[i]) == free and n % _product((*parts[i], *axes[:count]), sizes) == 0
            ]
            if fits:
                widest = max(fits, key=lambda i: (i == wanted, shape[i]))
                parts[widest] = (*parts[widest], *axes[:count])
                return


def present(axes: tuple[str, ...], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Those of the axes that the mesh has more than one device along."""
    return tuple(axis for axis in axes if sizes.get(axis, 1) > 1)


def _product(axes: tuple[str, ...], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes.get(axis, 1) for axis in axes)


def placement_on(mesh: Mesh | AbstractMesh, smallest: int, config: MeshConfig | None = None) -> Placement | None:
    """What the names of dimensions mean on a mesh, for a program that is traced for it.

    Args:
      mesh: Devices.
      smallest: Weights of fewer numbers stay whole.
      config: Capacity of the experts' exchange, and the schedule of the pipeline.

    Returns:
      The placement; None on one device.
    """
    config = config or MeshConfig()
    if math.prod(mesh.shape.values()) == 1:
        return None
    outside = _placement(mesh, dict(mesh.shape), smallest, config.expert_capacity)
    devices = mesh.shape.get("pipe", 1)
    if devices == 1:
        return outside
    inside = _placement(mesh, {**mesh.shape, "pipe": 1, "data": 1}, smallest, config.expert_capacity)
    hop, repeated = 2 if config.overlap else 1, present(("data",), mesh.shape)
    ring = Ring("pipe", repeated, devices, config.interleave, config.microbatches, hop, inside)
    return replace(outside, ring=ring)


def _placement(mesh: Mesh | AbstractMesh, sizes: Mapping[str, int], smallest: int, capacity: float) -> Placement:
    """The placement where axes have these sizes."""

    def weight(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[PartitionSpec, PartitionSpec]:
        name = "/".join(path)
        return (
            weight_spec(name, shape, sizes, smallest=smallest),
            weight_spec(name, shape, sizes, kept=False),
        )

    axes = {name: present(axes, sizes) for name, axes in DIMENSIONS.items()}
    return Placement(mesh, {name: axes for name, axes in axes.items() if axes}, weight, capacity)
