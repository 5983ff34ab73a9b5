"""What happened to a run: history.jsonl, one line an event, which is only ever appended to."""

import json
import os
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HISTORY = "history.jsonl"


class History:
    """The record of one run folder; it is silent until the run has started, so that a refused start changes nothing."""

    def __init__(self, workdir: Path) -> None:
        """Names the file; nothing is written.

        Args:
          workdir: Run folder.
        """
        self.path, self.started = workdir / HISTORY, False

    def start(self, **told: Any) -> None:
        """Records a start; events are recorded from here on.

        Args:
          **told: JSON-able.

        Raises:
          OSError: The file cannot be written.
        """
        self._write("started", told | {"host": socket.gethostname(), "pid": os.getpid()})
        self.started = True

    def note(self, event: str, **told: Any) -> None:
        """Records what happened after a start; a failure to write it is said, and ends nothing.

        Args:
          event: "stopped", "ended", "failed", "interrupted" or "hung".
          **told: JSON-able.
        """
        if not self.started:
            return
        try:
            self._write(event, told)
        except OSError as error:
            print(f"{self.path} could not be written ({error.strerror or error})", file=sys.stderr, flush=True)

    def _write(self, event: str, told: dict[str, Any]) -> None:
        """Appends by one write, so that a kill can cut no line but the last; after such a one a new line begins."""
        row = {"event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **told}
        with self.path.open("ab+", buffering=0) as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                cut = file.read(1) != b"\n"
            else:
                cut = False
            file.write(b"\n" * cut + json.dumps(row).encode() + b"\n")
            os.fsync(file.fileno())


def read_history(workdir: Path) -> tuple[list[dict[str, Any]], int]:
    """Reads the events of a run.

    Args:
      workdir: Run folder.

    Returns:
      The events, oldest first, and how many lines could not be read: a kill may have cut them.

    Raises:
      OSError: The file is there and cannot be read.
    """
    path = workdir / HISTORY
    lines = path.read_bytes().splitlines() if path.exists() else []
    events, damaged = [], 0
    for line in filter(None, lines):
        try:
            event = json.loads(line)
            datetime.fromisoformat(event["time"])
            events.append(event | {"event": str(event["event"])})
        except (ValueError, KeyError, TypeError):
            damaged += 1
    return events, damaged
