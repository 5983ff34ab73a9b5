"""How long a step takes at least on H100s: what they multiply, read and send, at the rates that they are built for.

An estimate of what no schedule can beat, not of what a run will reach: kernels stay below the peak, and what can be
hidden behind what is for the compiler to find.
"""

import math
from collections import defaultdict
from collections.abc import Mapping

from jax.sharding import Mesh

from r1jax.parallel.collectives import Collective
from r1jax.train.peak import peak_flops

DEVICE = "NVIDIA H100"
MEMORY = 80e9
"""Bytes of an H100 SXM."""
MEMORY_RATE = 3.35e12
"""Bytes a second that it reads or writes (data sheet)."""
NODE = 8
"""GPUs that NVLink joins."""
NVLINK_RATE, NETWORK_RATE = 450e9, 50e9
"""Bytes a second that a GPU sends: NVLink 4 in one direction, and one 400 Gb/s adapter a GPU between nodes."""


def roofline_rows(
    found: list[Collective], mesh: Mesh, flops: float, held: int, dtype: str, idle: float = 0.0
) -> list[tuple[str, str]]:
    """Says what a step exchanges, and how long it takes at least.

    Args:
      found: Exchanges of the compiled step.
      mesh: Its devices.
      flops: Of the model, of a step on all devices.
      held: Bytes of the state on a device; a step reads and writes them once.
      dtype: In which the model multiplies.
      idle: Time in which a device of a pipeline has nothing to do, relative to that of all products.

    Returns:
      Rows of a table: name and value.
    """
    narrow = 0.5 if dtype in ("bfloat16", "float16") else 1.0  # XLA's CPU compiler sends these as fp32
    sent: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
    for one in found:
        if not one.rare:
            sent[one.kind, one.axes] += one.wire_bytes * narrow
    further = sum(one.wire_bytes * narrow for one in found if one.rare)
    rows = [("sent by a device a step", f"{sum(sent.values()) / 2**20:,.1f} MiB")]
    rows += [
        (
            f"  {kind}, {' + '.join(axes)}",
            f"{size / 2**20:,.1f} MiB{'' if near(mesh.shape, axes) else ', between nodes'}",
        )
        for (kind, axes), size in sorted(sent.items(), key=lambda item: -item[1])
    ]
    if further:
        rows.append(("  further rounds to experts", f"{further / 2**20:,.1f} MiB at most, where routing is uneven"))
    peak = peak_flops(DEVICE, dtype)
    assert peak is not None
    times = {
        "products": flops / mesh.size / peak,
        "memory of the state": 2 * held / MEMORY_RATE,
        "NVLink": sum(size for (_, axes), size in sent.items() if near(mesh.shape, axes)) / NVLINK_RATE,
        "network": sum(size for (_, axes), size in sent.items() if not near(mesh.shape, axes)) / NETWORK_RATE,
    }
    waits = idle * times["products"]
    longest = max(times["products"] + waits, *times.values())
    total = sum(times.values()) + waits
    times |= {"idle in the pipeline": waits} if waits else {}
    told = ", ".join(f"{name} {1e3 * seconds:,.3g}" for name, seconds in times.items())
    return [
        *rows,
        ("H100s need at least", f"{1e3 * longest:,.3g} ms a step if all overlaps, {1e3 * total:,.3g} ms if nothing"),
        ("  of it, in ms", told),
        ("  model FLOPs utilisation", f"at most {times['products'] / longest:.1%}"),
    ]


def near(sizes: Mapping[str, int], axes: tuple[str, ...]) -> bool:
    """Whether devices that differ along these axes are in one node, laid out by `make_mesh`."""
    names = list(sizes)
    outermost = min((names.index(axis) for axis in axes), default=len(names))
    return math.prod(list(sizes.values())[outermost:]) <= NODE
