"""What a run folder tells an onlooker; it is read as it is, however damaged, and nothing in it is touched."""

import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from r1jax.errors import UserError
from r1jax.train.checkpoint import MANIFEST, Checkpoint
from r1jax.train.checkpoints import CheckpointFolder
from r1jax.train.history import HISTORY, read_history
from r1jax.train.watch import HEARTBEAT, process_start

SIGNS = ("config.json", HISTORY, "metrics.jsonl", "checkpoints")
FRESH_S = 120.0
"""A heartbeat of another machine this young is taken for a living run."""


@dataclass
class RunFolder:
    """One run, as far as its files can be read."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    heartbeat: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of metrics.jsonl."""
    metas: dict[int, dict[str, Any]] = field(default_factory=dict)
    """meta.json of each checkpoint, by step."""
    problems: list[str] = field(default_factory=list)
    """What could not be read, and why."""

    @property
    def steps(self) -> int | None:
        """Steps of the whole run."""
        train = self.config.get("train")
        found = train.get("steps") if isinstance(train, dict) else None
        return found if isinstance(found, int) else None

    @property
    def step(self) -> int:
        """Steps done, by whichever file knows most."""
        known = [self.heartbeat.get("step"), *self.metas, *(e.get("step") for e in self.events[-1:])]
        known += [row["step"] for row in self.rows[-1:]]
        return max((step for step in known if isinstance(step, int)), default=0)

    @property
    def best(self) -> tuple[int, dict[str, Any]] | None:
        """Step and validation of the checkpoint with the highest score."""
        scored = [(v["score"], step, v) for step, v in self._validations() if isinstance(v.get("score"), float | int)]
        return max(scored, key=lambda row: row[:2])[1:] if scored else None

    @property
    def last(self) -> tuple[int, dict[str, Any]] | None:
        """Step and validation of the newest checkpoint that was validated."""
        return max(self._validations(), key=lambda row: row[0], default=None)

    def _validations(self) -> list[tuple[int, dict[str, Any]]]:
        found = ((step, meta.get("validation")) for step, meta in self.metas.items())
        return [(step, v) for step, v in found if isinstance(v, dict)]

    def latest(self, name: str) -> Any:
        """The newest value of a figure in metrics.jsonl; None where it was never written."""
        return next((row[name] for row in reversed(self.rows) if name in row), None)

    def state(self) -> tuple[str, str]:
        """What became of the run.

        Returns:
          One of training, finished, stopped, failed, hung, killed, silent, unknown or empty; and what else is known.
        """
        last = self.events[-1] if self.events else {}
        event = last.get("event")
        at = f"at step {last.get('step')}"
        if event == "started":
            return self._living(last)
        if event == "ended":
            whole = self.steps is not None and self.step >= self.steps
            return ("finished", "") if whole else ("stopped", at)
        if event in ("stopped", "interrupted"):
            return "stopped", f"by {last.get('signal', 'a second Ctrl-C')} {at}"
        if event in ("failed", "hung"):
            return event, f"{at}: {last.get('message')}"
        if self.steps is not None and self.step >= self.steps:
            return "finished", ""
        return ("unknown", "no history tells how it ended") if self.metas or self.rows else ("empty", "")

    def _living(self, start: dict[str, Any]) -> tuple[str, str]:
        """State of a run whose last start has no end."""
        beat, here = self.heartbeat, socket.gethostname()
        host, pid = start.get("host"), start.get("pid")
        if beat.get("pid") != pid or beat.get("host") != host:
            beat = {}  # of an earlier start
        age = time.time() - float(beat.get("time", datetime.fromisoformat(start["time"]).timestamp()))
        told = f"{beat.get('phase', 'starting')}, heartbeat {age:.0f} s ago"
        if host != here:
            return ("training" if age < FRESH_S else "silent"), f"on {host}, {told}"
        began = process_start(pid) if isinstance(pid, int) else None
        alive = began is not None and beat.get("process_start", began) == began
        return ("training", f"process {pid}, {told}") if alive else ("killed", f"during step {self.step + 1} or later")

    def seconds(self) -> float:
        """Time that the starts of the run took together; one that was killed counts up to its last heartbeat."""
        total, began = 0.0, None
        beat = self.heartbeat.get("time")
        for event in self.events:
            at = datetime.fromisoformat(event["time"]).timestamp()
            if event["event"] == "started":
                began = at
            elif began is not None:
                total, began = total + at - began, None
        if began is not None and isinstance(beat, float | int):
            total += max(beat - began, 0.0)
        return total

    def made(self) -> dict[str, Any]:
        """What the last start says of versions, data and command, or else the newest checkpoint."""
        starts = [event for event in self.events if event["event"] == "started"]
        return starts[-1] if starts else self.metas.get(max(self.metas, default=0), {})


def read_run(path: Path) -> RunFolder:
    """Reads a run folder.

    Args:
      path: The folder.

    Returns:
      What could be read; `problems` has the rest.
    """
    run = RunFolder(path)
    run.config = _object(path / "config.json", run.problems)
    run.heartbeat = _object(path / HEARTBEAT, run.problems, needed=False)
    try:
        run.events, cut = read_history(path)
        if cut:
            run.problems.append(f"{path / HISTORY}: {cut} line(s) cut short or unreadable")
    except OSError as error:
        run.problems.append(f"{path / HISTORY}: {error.strerror or error}")
    run.rows = _rows(path / "metrics.jsonl", run.problems)
    try:
        checkpoints = CheckpointFolder(path / "checkpoints").all()
    except OSError as error:
        checkpoints = []
        run.problems.append(f"{path / 'checkpoints'}: {error.strerror or error}")
    for checkpoint in checkpoints:
        run.metas[checkpoint.step] = _object(checkpoint.path / "meta.json", run.problems)
        if not (checkpoint.path / MANIFEST).is_file():
            run.problems.append(f"{checkpoint.path / MANIFEST}: is missing")
    for pattern, why in (("damaged-*", "as damaged"), ("left-*", "when the run went further back")):
        run.problems += [f"{p}: set aside {why}" for p in sorted((path / "checkpoints").glob(pattern))]
    return run


def find_runs(folder: Path) -> Iterator[Path]:
    """Looks for runs.

    Args:
      folder: A run, or a folder of runs or of folders of runs.

    Yields:
      Run folders, and folders without any run below them, in the order of their names.

    Raises:
      UserError: There is no such folder, or it cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give one that holds runs, for example: r1jax runs list runs")
    if _is_run(folder):
        yield folder
        return
    try:
        inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}") from None
    for path in inside:
        if _is_run(path):
            yield path
        else:
            yield from list(_below(path)) or [path]


def _below(folder: Path) -> Iterator[Path]:
    for place, folders, _ in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if _is_run(Path(place)):
            folders.clear()
            yield Path(place)


def _is_run(path: Path) -> bool:
    return sum((path / name).exists() for name in SIGNS) >= 2 or (path / HISTORY).exists()


def foreign(path: Path) -> str | None:
    """Says what a folder is that is no run; None for a run."""
    if _is_run(path):
        return None
    if (path / MANIFEST).is_file():
        checkpoint = Checkpoint(path)
        try:
            return "imported weights" if checkpoint.imported else "a single checkpoint"
        except UserError as error:
            return str(error)
    return f"no run: it holds none of {', '.join(SIGNS)}" if not any((path / s).exists() for s in SIGNS) else "no run"


def _object(path: Path, problems: list[str], needed: bool = True) -> dict[str, Any]:
    """A JSON object; whatever else is there becomes a problem."""
    try:
        value = json.loads(path.read_text())
        if isinstance(value, dict):
            return value
        problems.append(f"{path}: is no JSON object")
    except FileNotFoundError:
        if needed:
            problems.append(f"{path}: is missing")
    except OSError as error:
        problems.append(f"{path}: {error.strerror or error}")
    except ValueError as error:
        problems.append(f"{path}: {error}")
    return {}


def _rows(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; the last one may be cut short, which is no problem."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"{path}: {error.strerror or error}")
        return []
    rows, bad = [], 0
    for number, text in enumerate(lines, 1):
        try:
            row = json.loads(text)
            if not isinstance(row["step"], int):
                raise TypeError
            rows.append(row)
        except (ValueError, KeyError, TypeError):
            bad += number < len(lines)
    if bad:
        problems.append(f"{path}: {bad} unreadable line(s)")
    return rows
