"""Whether a run still moves: a heartbeat file for onlookers, and an end to a run that hangs."""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from r1jax.train.history import History

HEARTBEAT = "heartbeat.json"
HUNG = 75
"""Exit code of a run that hung (EX_TEMPFAIL of sysexits.h): the same command may well succeed."""
TICK_S = 1.0


class Watch:
    """A thread beside the training that looks at what the training last said of itself.

    Only the thread's own waiting is added up, and no tick counts for more than two: neither a jump of the wall clock
    nor a process that was suspended looks like a hang.
    """

    def __init__(self, workdir: Path, history: History, timeout: float) -> None:
        """Starts the thread.

        Args:
          workdir: Run folder; the heartbeat is written once the history has started.
          history: Gets the hang.
          timeout: Seconds without progress that are a hang; 0 lets a run hang.
        """
        self.workdir, self.history, self.timeout = workdir, history, timeout
        self.step, self.phase = 0, "start"
        self._beats, self._at, self._written, self._complained = 0, time.time(), -1, False
        self._waits = False
        self._tick = min(TICK_S, timeout / 4) if timeout else TICK_S
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def enter(self, phase: str, step: int | None = None) -> None:
        """Says that the training goes on.

        Args:
          phase: What it does from now on.
          step: Steps done; None where they are as before.
        """
        self.phase = phase
        if step is not None:
            self.step = step
        self.beat()

    def beat(self) -> None:
        """Says that the training goes on with what it did."""
        self._at = time.time()
        self._beats += 1

    @contextmanager
    def left_to_another(self, waits: bool) -> Iterator[None]:
        """Lets the training wait inside for as long as another process does something, which has a watch of its own.

        Args:
          waits: Whether this process does; otherwise nothing changes.
        """
        self._waits = waits
        try:
            yield
        finally:
            self._waits = False
            self.beat()

    def close(self) -> None:
        """Ends the thread; the last heartbeat stays."""
        self._closing.set()
        self._thread.join()
        self._write()

    def _look(self) -> None:
        """Body of the thread."""
        seen, idle, last = self._beats, 0.0, time.monotonic()
        while not self._closing.wait(self._tick):
            now = time.monotonic()
            if self._beats != seen or self._waits:
                seen, idle = self._beats, 0.0
            else:
                idle += min(now - last, 2 * self._tick)
            last = now
            if self.timeout and idle >= self.timeout:
                self._end()
            self._write()

    def _write(self) -> None:
        """Replaces the heartbeat if there was progress; a full disk is said once and is no reason to stop."""
        beats = self._beats
        if not self.history.started or beats == self._written:
            return
        row = {
            "step": self.step,
            "phase": self.phase,
            "time": self._at,
            "monotonic": time.monotonic(),
            "pid": os.getpid(),
            "process_start": process_start(os.getpid()),
            "host": socket.gethostname(),
        }
        draft = self.workdir / f".{HEARTBEAT}.draft"
        try:
            draft.write_text(json.dumps(row))
            draft.replace(self.workdir / HEARTBEAT)
            self._written = beats
        except OSError as error:
            if not self._complained:
                self._complained = True
                print(f"no heartbeat: {self.workdir / HEARTBEAT} {error.strerror or error}", file=sys.stderr)

    def _end(self) -> None:
        """Says where every thread stands, and leaves without waiting for any of them."""
        path = self.workdir / f"hang-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.txt"
        try:
            with path.open("w") as file:
                file.write(f"no progress for {self.timeout:g} s after step {self.step}, in: {self.phase}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            where = f"the stacks of all threads are in {path}"
        except OSError as error:
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
            where = f"{path} could not be written ({error.strerror or error})"
        told = f"no progress for {self.timeout:g} s after step {self.step}, in: {self.phase}; {where}"
        self.history.note("hung", step=self.step, phase=self.phase, message=told)
        print(
            f"error: {told}: run the same command again, with a larger --train.hang_timeout if this rightly takes so "
            "long",
            file=sys.stderr,
            flush=True,
        )
        os._exit(HUNG)  # the training thread may be in native code, where no exception reaches it


def process_start(pid: int) -> int | None:
    """When a process of this machine started, so that a number that was given anew is not taken for it.

    Args:
      pid: Its number.

    Returns:
      Clock ticks since the machine started; None where there is no such process.
    """
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
