"""Goodput: the share of the time since a run's first start that went into steps whose result was kept."""

import json
import os
import sys
import time
from collections.abc import Collection
from pathlib import Path

from r1jax.disk import flush

RECORD = "goodput.json"


class Clock:
    """Time of a run over all its processes; a record in its folder survives any of them.

    Within a process time is monotonic. Between two processes only the wall clock is left, from the record's last
    writing on; where it was set back meanwhile, nothing is added.
    """

    def __init__(self, workdir: Path) -> None:
        """Starts the process's part; the run's first process also begins the record.

        Args:
          workdir: Run folder.
        """
        self.path = workdir / RECORD
        self.began, wall = time.monotonic(), time.time()
        self.before, self.marks, self.useful = 0.0, {}, 0.0
        if not self.path.exists():
            self.write()
            return
        try:
            record = json.loads(self.path.read_text())
            self.before = record["seconds"] + max(0.0, wall - record["wall"])
            self.marks = {int(step): float(seconds) for step, seconds in record["useful"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"{self.path} cannot be read ({error}): goodput counts from now on", file=sys.stderr)
        self.useful = self.marks.get(max(self.marks, default=0), 0.0)

    def go_on(self, step: int) -> None:
        """Forgets the steps that will be done again; without any checkpoint left, a new run begins.

        Args:
          step: Steps done.
        """
        if step == 0 and self.marks:
            self.before = 0.0
        self.marks = {done: seconds for done, seconds in self.marks.items() if done <= step}
        self.useful = self.marks.get(max(self.marks, default=0), 0.0)

    @property
    def seconds(self) -> float:
        """Since the run's first start."""
        return self.before + time.monotonic() - self.began

    @property
    def goodput(self) -> float:
        """Share of `seconds` that went into steps."""
        return min(1.0, self.useful / max(self.seconds, 1e-9))

    def mark(self, step: int, useful: float, kept: Collection[int]) -> None:
        """Notes that a checkpoint was published: what went into its steps is not lost any more.

        Args:
          step: Steps done.
          useful: Seconds that had gone into them by then.
          kept: Steps of all checkpoints that are left.
        """
        self.marks = {done: seconds for done, seconds in {**self.marks, step: useful}.items() if done in kept}
        self.write()

    def write(self) -> None:
        """Replaces the record at once; a disk that takes none ends no run."""
        record = {"seconds": self.seconds, "wall": time.time(), "useful": self.marks}
        draft = self.path.with_suffix(".draft")
        try:
            draft.write_text(json.dumps(record))
            flush(draft)
            os.replace(draft, self.path)
        except OSError as error:
            print(f"{self.path} cannot be written ({error.strerror}): goodput may be lost", file=sys.stderr)
