"""Hit rates of the cache's policies beside Belady's optimum for the same requests and the same room.

    python benchmarks/cache.py --output benchmarks/results/cache.json      # about five minutes
    python benchmarks/cache.py --seeds 1 --scale 0.1 --output cache.json   # a quick try

Counts only: how busy the machine is does not matter. Training goes through `TieredStore` as a run does; the serving
traces go straight to its memory policy, one request a row. `found` is the share of lookups whose row group (or row) was
in memory when the reader asked. A look-ahead is given the time that it needs: whether it has that in a run is a matter
of speed, not of the policy. Belady's optimum knows the future and may also keep a value out; with look-ahead no
optimum of demands is a bound, so only what was read from the cold store is compared there.
"""

import argparse
import heapq
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.children import told_command  # noqa: E402
from r1jax.config import CacheConfig  # noqa: E402
from r1jax.data.cache_memory import ServeMemory  # noqa: E402
from r1jax.data.schema import Field, Schema  # noqa: E402
from r1jax.data.tiered import TieredStore  # noqa: E402

ROWS, GROUP, BATCH, EPOCHS = 32_768, 64, 32, 5
WINDOW, AHEAD = 8, 32
KEYS, REQUESTS = 20_000, 400_000
SCHEMA = Schema((Field("id", "number", "int64"),))


class Numbers:
    """A cold store whose rows are their own indices."""

    def __init__(self, rows: int) -> None:
        self.schema, self.fingerprint = SCHEMA, "numbers"
        self.starts = np.arange(0, rows + 1, GROUP)
        self.read = 0

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read_blocks(self, blocks: Sequence[int]) -> list[pa.RecordBatch]:
        self.read += len(blocks)
        return [
            pa.RecordBatch.from_arrays([pa.array(np.arange(self.starts[b], self.starts[b + 1]))], schema=SCHEMA.arrow)
            for b in blocks
        ]


def belady(trace: Sequence[int], room: int) -> int:
    """Most hits that any cache of `room` values of one size can have on a trace (Belady's MIN, with bypassing)."""
    following, last = [0] * len(trace), {}
    for place in range(len(trace) - 1, -1, -1):
        following[place] = last.get(trace[place], len(trace))
        last[trace[place]] = place
    held: dict[int, int] = {}  # value -> its next use
    furthest: list[tuple[int, int]] = []
    hits = 0
    for place, value in enumerate(trace):
        hits += value in held
        held[value] = following[place]
        heapq.heappush(furthest, (-following[place], value))
        while len(held) > room:
            use, victim = heapq.heappop(furthest)
            if held.get(victim) == -use:  # else an older use of it
                del held[victim]
    return hits


def epoch_order(rows: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches of a new global shuffle every epoch."""
    for _ in range(EPOCHS):
        yield from rng.permutation(rows).reshape(-1, BATCH)


def window_order(rows: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches of rows that are shuffled within windows of row groups, which are shuffled themselves."""
    for _ in range(EPOCHS):
        groups = rng.permutation(rows // GROUP)
        for start in range(0, len(groups), WINDOW):
            inside = (groups[start : start + WINDOW, None] * GROUP + np.arange(GROUP)).ravel()
            yield from rng.permutation(inside).reshape(-1, BATCH)


def train(batches: list[np.ndarray], rows: int, unit: str, room: int, ahead: int) -> dict:
    """Reads batches through the tiers, `ahead` batches after they were announced."""
    probe = TieredStore(Numbers(rows), CacheConfig(unit=unit))
    probe.read_rows(np.array([0]))
    cold = Numbers(rows)
    store = TieredStore(cold, CacheConfig(unit=unit, capacity=room * probe.counters().memory_bytes))
    for k, batch in enumerate(batches):
        announced = batches[k + ahead : k + ahead + 1] if k else batches[: ahead + 1]
        for later in announced if ahead else ():
            store.prefetch(later)
            store.drain()
        assert np.array_equal(store.read_rows(batch)["id"].to_numpy(), batch)
    counters = store.counters()
    units = [np.unique(batch // GROUP if unit == "group" else batch).tolist() for batch in batches]
    trace = [unit for batch in units for unit in batch]
    assert counters.lookups == len(trace)
    best = belady(trace, room)
    brought = counters.misses + counters.prefetched
    return {
        "found": counters.hit_rate,
        "belady": best / len(trace),
        "read_per_epoch": brought / EPOCHS,
        "belady_read_per_epoch": (len(trace) - best) / EPOCHS,
        "units": len(set(trace)),
    }


def serve(exponent: float, share: float, keys: int, requests: int, rng: np.random.Generator) -> dict:
    """Requests by a power law of popularity to the memory of policy serve."""
    weights = np.arange(1, keys + 1) ** -exponent
    trace = rng.permutation(keys)[rng.choice(keys, requests, p=weights / weights.sum())].tolist()
    room = int(share * keys)
    memory, hits = ServeMemory(room, ttl_s=math.inf), 0
    for key in trace:
        if memory.get(key) is None:
            memory.put(key, True, 1)
        else:
            hits += 1
    return {
        "found": hits / requests,
        "belady": belady(trace, room) / requests,
        "ceiling": 1 - len(set(trace)) / requests,
    }


def measure(seed: int, scale: float) -> dict[str, dict]:
    """All cases with one seed."""
    rng = np.random.default_rng(seed)
    rows = int(ROWS * scale) // (GROUP * WINDOW) * GROUP * WINDOW
    groups = rows // GROUP
    found = {}
    for share in (0.1, 0.5, 0.9):
        batches = list(epoch_order(rows, rng))
        found[f"training, global order, rows, {share:.0%} fits"] = train(batches, rows, "row", int(share * rows), 0)
    batches = list(epoch_order(rows, rng))
    room = groups // 10
    found["training, global order, row groups, 10% fits"] = train(batches, rows, "group", room, 0)
    batches = list(window_order(rows, rng))
    for windows in (2, 4):
        for ahead in (0, AHEAD):
            name = f"training, windows of {WINDOW}, {windows} windows fit" + (
                f", {ahead} batches ahead" if ahead else ""
            )
            found[name] = train(batches, rows, "group", windows * WINDOW, ahead)
    for exponent, share in ((0.9, 0.4), (1.1, 0.4), (1.3, 0.1)):
        case = serve(exponent, share, int(KEYS * scale), int(REQUESTS * scale), rng)
        found[f"serving, Zipf {exponent}, {share:.0%} fits"] = case
    return found


def medians(runs: list[dict[str, dict]]) -> dict[str, dict]:
    """Median and range of each number over the seeds."""
    told = {}
    for name in runs[0]:
        told[name] = {
            what: {
                "median": statistics.median(run[name][what] for run in runs),
                "lowest": min(run[name][what] for run in runs),
                "highest": max(run[name][what] for run in runs),
            }
            for what in runs[0][name]
        }
    return told


def table(report: dict) -> str:
    """Markdown."""
    lines = [
        "| requests | found | Belady | points below | read from the cold store | Belady |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in report["cases"].items():
        value = {what: numbers["median"] for what, numbers in case.items()}
        below = "-" if "ahead" in name else f"{100 * (value['belady'] - value['found']):.1f}"
        read = ("", "")
        if "units" in value:
            read = (f"{value['read_per_epoch']:,.0f} of {value['units']:,.0f} an epoch",
                    f"{value['belady_read_per_epoch']:,.0f}")  # fmt: skip
        lines.append(f"| {name} | {value['found']:.1%} | {value['belady']:.1%} | {below} | {read[0]} | {read[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of rows and requests")
    args = parser.parse_args()
    start = time.monotonic()
    runs = []
    for seed in range(args.seeds):
        runs.append(measure(seed, args.scale))
        print(f"seed {seed}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    report = {
        "command": told_command(),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("numpy", "pyarrow")},
        },
        "arguments": {"seeds": args.seeds, "scale": args.scale},
        "seconds": time.monotonic() - start,
        "cases": medians(runs),
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
