"""What a profiler's trace holds of kernels, and what a compiled program says of the operation that each one runs."""

import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.profiler import ProfileData


class Event(NamedTuple):
    """One run of a kernel, in nanoseconds."""

    began: float
    ended: float
    name: str
    operation: str
    """HLO instruction that it belongs to, as the trace has it; "" where it says none."""


def device_events(path: Path) -> list[Event]:
    """Reads a trace.

    Args:
      path: The `.xplane.pb`.

    Returns:
      What ran on the devices in the order of time; on a CPU, what its threads ran of compiled programs.
    """
    planes = list(ProfileData.from_file(str(path)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    found = []
    with warnings.catch_warnings():  # on Python 3.12 the type of an event's statistics lacks an attribute
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in devices or [plane for plane in planes if plane.name.startswith("/host:CPU")]:
            for line in plane.lines:
                if devices and not line.name.startswith("Stream"):  # the others sum the kernels up once more
                    continue
                for event in line.events:
                    operation = str(dict(event.stats).get("hlo_op") or "")
                    if devices or operation:  # a CPU's lines hold Python too
                        ended = event.start_ns + event.duration_ns
                        found.append(Event(event.start_ns, ended, event.name, operation))
    return sorted(found)


def kernels(events: Iterable[Event], count: int) -> dict[str, Any]:
    """Sums events up.

    Args:
      events: In the order of time.
      count: Tokens or steps that they hold.

    Returns:
      Microseconds, of each of them, of the ten costliest kernels, of all together, and between the end of one and the
      start of the next; and after which kernels the longest pauses come.
    """
    events = [event._replace(name=re.sub(r"[._]\d+$", "", event.name)) for event in events]
    spent: dict[str, list[float]] = {}
    pauses: dict[str, float] = {}
    reached = events[0].began if events else 0.0
    last, between, busy = "", 0.0, 0.0
    for began, ended, name, _ in events:
        spent.setdefault(name, []).append(ended - began)
        if began > reached:
            between += began - reached
            pauses[last] = pauses.get(last, 0.0) + began - reached
        busy += max(0.0, ended - max(began, reached))
        if ended > reached:
            reached, last = ended, name
    each = 1e3 * count
    costliest = sorted(spent, key=lambda name: -sum(spent[name]))[:10]
    return {
        "us": busy / each,
        "between_us": between / each,
        "kernels": len(events) / count,
        "costliest": [
            {"kernel": name[:80], "us": sum(spent[name]) / each, "calls": len(spent[name]) / count}
            for name in costliest
        ],
        "pauses_after": {k[:80]: pauses[k] / each for k in sorted(pauses, key=pauses.get, reverse=True)[:5]},
    }


# --- programs -------------------------------------------------------------------------------------------------------

CALLS = ("call", "while", "conditional", "async-start", "async-done")
"""Instructions that run others."""
IDLE = (*CALLS, "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all")
"""Instructions that launch nothing themselves."""


class Instruction(NamedTuple):
    """One line of a compiled program."""

    opcode: str
    op_name: str
    """Path of the traced operation, such as `jit(step)/jvp(R1)/R1._read/text/add`."""
    frame: int
    """Where in Python it was traced; 0 where that is not told."""
    called: str
    """Computation of a fusion or of a call, such as that of a CUDA graph."""
    text: str


class Program:
    """The text of a compiled program, by instruction."""

    def __init__(self, text: str) -> None:
        """Reads it.

        Args:
          text: `compiled.as_text()`.
        """
        self.instructions: dict[str, Instruction] = {}
        self.computations: dict[str, list[Instruction]] = {}
        self.entry: list[Instruction] = []
        inside: list[Instruction] = []
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                inside = self.computations[head[2]] = []
                self.entry = inside if head[1] else self.entry
            elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = .*?\s([a-z][\w\-]*)\(", line):
                told = {key: re.search(pattern, line) for key, pattern in _FIELDS.items()}
                name, frame, called = (match[1] if match else "" for match in told.values())
                instruction = Instruction(found[2], name, int(frame or 0), called, line)
                self.instructions[found[1]] = instruction
                inside.append(instruction)
        self._kernels = {re.sub(r"\W", "_", name): one for name, one in self.instructions.items()}
        self._functions, self._frames = _stack_frames(text)

    def instruction_of(self, event: Event) -> Instruction | None:
        """What an event runs; None where neither the operation it names nor its own name is in the program.

        Kernels of a CUDA graph may name the graph alone. Then the kernel's own name counts, which is that of a fusion;
        fusions that are alike share the kernel of one of them.
        """
        for name in (event.operation, event.name):
            found = self.instructions.get(name) or self._kernels.get(re.sub(r"\W", "_", name))
            if found is not None and found.opcode not in IDLE:
                return found
        return None

    def functions(self, frame: int) -> list[str]:
        """Names of the Python functions in which an instruction was traced, the innermost first."""
        found = []
        while frame in self._frames and len(found) < 200:  # a table that is not as expected must not be read for ever
            location, frame = self._frames[frame]
            found.append(self._functions.get(location, ""))
        return found

    def inner(self, instruction: Instruction) -> list[Instruction]:
        """The instructions of a fusion, those of fusions in it too."""
        own = self.computations.get(instruction.called, [])
        return [*own, *(one for fusion in own if fusion.called for one in self.inner(fusion))]

    def launches(self) -> int:
        """Instructions of the program that launch a kernel, where it has no loops."""
        return self._launches(self.entry)

    def _launches(self, instructions: list[Instruction]) -> int:
        calls = (self.computations.get(one.called, []) for one in instructions if one.opcode == "call")
        return sum(one.opcode not in IDLE for one in instructions) + sum(map(self._launches, calls))


_FIELDS = {
    "op_name": r'metadata=\{[^}]*?op_name="([^"]*)"',
    "frame": r"metadata=\{[^}]*?stack_frame_id=(\d+)",
    "called": r" (?:fusion\(.*calls|call\(.*to_apply)=%?([\w.\-]+)",
}


def _stack_frames(text: str) -> tuple[dict[int, str], dict[int, tuple[int, int]]]:
    """Function of each place in the code, and of each frame its place and the frame that called it (0: none)."""
    names = re.search(r"^FunctionNames\n(.*?)\n\n", text, re.DOTALL | re.MULTILINE)
    functions = dict(re.findall(r'^(\d+) "(.*)"', names[1], re.MULTILINE)) if names else {}
    places = re.findall(r"^(\d+) \{file_name_id=\d+ function_name_id=(\d+)", text, re.MULTILINE)
    frames = re.findall(r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)\}", text, re.MULTILINE)
    # The outermost frame has no parent: where it names itself, parents are printed one too high.
    above = int(bool(frames) and frames[0][0] == frames[0][2])
    return (
        {int(place): functions.get(name, "") for place, name in places},
        {int(frame): (int(place), int(parent) - above) for frame, place, parent in frames},
    )


def between_neighbours(parts: Sequence[str | None]) -> list[str | None]:
    """Gives what has no part that of both its neighbours, where these have the same: kernels run in program order."""
    after: list[str | None] = [None] * len(parts)
    following = None
    for i in reversed(range(len(parts))):
        following = after[i] = parts[i] or following
    found, before = [], None
    for part, later in zip(parts, after, strict=True):
        before = part or before
        found.append(part or (before if before == later else None))
    return found
