"""What the devices of a mesh exchange, read from a compiled program."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jax.sharding import AbstractMesh, Mesh

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8}
BYTES |= {"bf16": 2, "f16": 2, "f32": 4, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(-start)?\(")
ARRAY = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]")
CALL = re.compile(r"(?:body|calls|to_apply)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
BRANCH = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
    """One exchange of a compiled program."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes along which its devices differ."""
    devices: int
    """Of one group."""
    senders: float
    """Share of all devices that send: of a permutation some may not."""
    shapes: tuple[str, ...]
    """Of what each device has afterwards, as XLA writes them: `f32[8,16]`."""
    result_bytes: int
    times: int
    """How often a step does it; loops count each turn."""
    rare: bool
    """In one branch of a choice: the further rounds of the experts' exchange, which even routing does not need."""
    name: str
    """Where in the program it comes from."""

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends in a step, on average, by the ring algorithms of NCCL for large arrays."""
        others = self.devices - 1
        once = {
            "all-reduce": 2 * others / self.devices,
            "all-gather": others / self.devices,
            "reduce-scatter": float(others),  # the result is one part of what is summed
            "all-to-all": others / self.devices,
            "collective-permute": self.senders,
        }
        return self.times * once[self.kind] * self.result_bytes


def collectives(program: str, mesh: Mesh | AbstractMesh) -> list[Collective]:
    """Reads the exchanges of a compiled program.

    Args:
      program: Optimized HLO (`compiled.as_text()`).
      mesh: For which it was compiled.

    Returns:
      One entry for each instruction between more than one device.
    """
    bodies = dict(_computations(program))
    times, rare = _times(bodies)
    found = []
    for name, lines in bodies.items():
        for line in lines:
            match = COLLECTIVE.search(line)
            if match and times.get(name):
                axes, devices = _group(line, mesh)
                if devices > 1:
                    shapes = ARRAY.findall(match[1])
                    if match[3]:  # an asynchronous start has its operands beside its results
                        shapes = shapes[len(shapes) // 2 :]
                    size = sum(BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in shapes)
                    told = tuple(f"{kind}[{dims}]" for kind, dims in shapes)
                    origin = re.search(r'op_name="([^"]*)"', line)
                    place = origin[1] if origin else ""
                    how_often = times[name], name in rare, place
                    found.append(Collective(match[2], axes, devices, _senders(line, mesh), told, size, *how_often))
    return found


def _computations(program: str) -> Iterator[tuple[str, list[str]]]:
    """Yields the name and the instructions of each computation; the entry is called ENTRY."""
    name, lines = "", []
    for line in program.splitlines():
        match = COMPUTATION.match(line)
        if match:
            name, lines = "ENTRY" if match[1] else match[2], []
        elif line.startswith("}"):
            yield name, lines
        else:
            lines.append(line)


def _times(bodies: Mapping[str, list[str]]) -> tuple[dict[str, int], set[str]]:
    """How often each computation runs at most in a run of the entry, and which run only where a choice falls so."""
    times: dict[str, int] = {}
    rare = set()

    def visit(name: str, count: int, chosen: bool) -> None:
        times[name] = times.get(name, 0) + count
        if chosen:
            rare.add(name)
        for line in bodies.get(name, ()):
            trips = TRIPS.search(line) if " while(" in line else None
            for inner in CALL.findall(line):
                visit(inner, count * (int(trips[1]) if trips else 1), chosen)
            listed = ", ".join([*BRANCHES.findall(line), *BRANCH.findall(line)])
            for inner in filter(None, listed.split(", ")):
                visit(inner.lstrip("%"), count, True)

    visit("ENTRY", 1, False)
    return times, rare


def _group(line: str, mesh: Mesh | AbstractMesh) -> tuple[tuple[str, ...], int]:
    """Axes along which the devices of a group differ, and how many devices it has."""
    names, sizes = tuple(mesh.shape), tuple(mesh.shape.values())
    group = _first_group(line, math.prod(sizes))
    places = np.stack(np.unravel_index(group, sizes), axis=1)
    return tuple(name for name, column in zip(names, places.T, strict=True) if len(set(column)) > 1), len(group)


def _senders(line: str, mesh: Mesh | AbstractMesh) -> float:
    """Share of the devices that send anything to another one."""
    return sum(a != b for a, b in _pairs(line)) / mesh.size if "source_target_pairs=" in line else 1.0


def _pairs(line: str) -> list[tuple[int, int]]:
    """Who sends to whom in a permutation."""
    return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", line.split("source_target_pairs=")[1])]


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _laid(devices: int, dims: str, order: str | None) -> np.ndarray:
    """All devices in the order of a grid whose axes may be exchanged."""
    grid = np.arange(devices).reshape(_numbers(dims))
    return (grid.transpose(_numbers(order)) if order else grid).reshape(-1)


def _first_group(line: str, devices: int) -> np.ndarray:
    """Devices of the first group, in any of the notations of XLA."""
    if "source_target_pairs=" in line:
        return np.array(next((pair for pair in _pairs(line) if pair[0] != pair[1]), [0]))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return np.array(_numbers(listed[1]))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        return _laid(devices, iota[2], iota[3]).reshape(_numbers(iota[1]))[0]
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}", line
    )
    if named:
        axes, varied = re.findall(r"'(\w+)'=(\d+)", named[1]), re.findall(r"'(\w+)'", named[4])
        grid = _laid(devices, named[2] or str(devices), named[3]).reshape([int(n) for _, n in axes])
        return grid[tuple(slice(None) if name in varied else 0 for name, _ in axes)].reshape(-1)
    return np.arange(devices)
