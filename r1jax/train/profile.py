"""A trace of some training steps, and which operations took the time."""

import os
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

from r1jax.config import ProfileConfig

COSTLIEST = 10
FOLDER = "profile"


class Op(NamedTuple):
    """All runs of one operation in a trace."""

    name: str
    count: int
    milliseconds: float
    """In all, on all devices, without the operations inside it."""
    share: float
    """Of the time of all operations."""


class Profiler:
    """Traces the steps that the config names."""

    def __init__(self, config: ProfileConfig, workdir: Path, done: int) -> None:
        """Says which steps are traced.

        Args:
          config: How many, and after how many.
          workdir: Run folder; the trace goes into its `profile/`.
          done: Steps done before this process.
        """
        self.folder, self.running = workdir / FOLDER, False
        self.first = done + config.start + 1
        self.last = done + config.start + config.steps

    def begins(self, step: int) -> bool:
        """Whether this step is the first one to trace."""
        return self.first == step <= self.last

    def ends(self, step: int) -> bool:
        """Whether this step is the last one to trace."""
        return self.running and step == self.last

    def missed(self, step: int) -> bool:
        """Whether steps were to be traced that the run, at its end, has not come to."""
        return self.first <= self.last and step < self.first

    def start(self) -> None:
        """Begins the trace; what was dispatched before must have ended."""
        jax.profiler.start_trace(str(self.folder), create_perfetto_trace=True)
        self.running = True

    def stop(self) -> str:
        """Ends the trace and writes it; what was dispatched must have ended.

        Returns:
          The table of the costliest operations, and where the trace is.
        """
        self.running = False
        jax.profiler.stop_trace()
        newest = max(self.folder.rglob("*.xplane.pb"), key=os.path.getmtime)
        said = (
            f"trace of the steps: {newest.parent}/perfetto_trace.json.gz (ui.perfetto.dev), {self.folder} (TensorBoard)"
        )
        return f"{table(read_ops(newest))}\n{said}"


def read_ops(path: Path) -> list[Op]:
    """Reads which operations a trace holds and how long each ran.

    Args:
      path: The `.xplane.pb` of the trace.

    Returns:
      The operations of the devices, the costliest first; on a CPU, of the threads that run compiled programs.
    """
    planes = list(ProfileData.from_file(str(path)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for plane in devices or [plane for plane in planes if plane.name.startswith("/host:CPU")]:
        for line in plane.lines:
            if devices and not line.name.startswith("Stream"):  # the others sum the kernels up once more
                continue
            for name, nanoseconds in _own_times(_named(line.events, bool(devices))):
                times[name] += nanoseconds
                counts[name] += 1
    whole = sum(times.values())
    ranked = sorted(times, key=lambda name: -times[name])
    return [Op(name, counts[name], times[name] / 1e6, times[name] / whole) for name in ranked if whole]


def _named(events: Iterable[Any], device: bool) -> Iterable[tuple[str, float, float]]:
    """(operation, start, end) of the events that are one.

    Kernels that name no operation, or only the CUDA graph that they belong to, go by their own names.
    """
    with warnings.catch_warnings():  # on Python 3.12 the type of an event's statistics lacks an attribute
        warnings.simplefilter("ignore", DeprecationWarning)
        for event in events:
            stats = dict(event.stats)
            name = stats.get("hlo_op")
            if device and (name is None or str(name).startswith("command_buffer")):
                name = event.name
            if name is not None:
                yield str(name), event.start_ns, event.start_ns + event.duration_ns


def _own_times(events: Iterable[tuple[str, float, float]]) -> Iterable[tuple[str, float]]:
    """Duration of each event of one thread without the events that lie in it, as a loop's body lies in the loop."""
    open_events: list[list[Any]] = []  # name, end, own time
    for name, start, end in sorted(events, key=lambda event: (event[1], -event[2])):
        while open_events and open_events[-1][1] <= start:
            closed = open_events.pop()
            yield closed[0], closed[2]
        if open_events:
            open_events[-1][2] -= min(end, open_events[-1][1]) - start
        open_events.append([name, end, end - start])
    yield from ((name, max(0.0, own)) for name, _, own in open_events)


def table(ops: list[Op]) -> str:
    """Renders the costliest operations.

    Args:
      ops: From `read_ops`.

    Returns:
      Lines of text, one an operation: name, how often, milliseconds in all, share of the time of all operations.
    """
    if not ops:
        return "the trace names no operation"
    rows = [(op.name[:60], f"{op.count:,}", f"{op.milliseconds:,.2f}", f"{op.share:.1%}") for op in ops[:COSTLIEST]]
    rows = [("operation", "count", "total ms", "share"), *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  " + "  ".join(f"{x:>{w}}" for x, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )
