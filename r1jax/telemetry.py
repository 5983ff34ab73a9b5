"""What a run says while it goes: metrics.jsonl, TensorBoard, W&B if asked for, and one progress view."""

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from r1jax.parallel.agree import is_first, say
from r1jax.train.goodput import Clock
from r1jax.train.tensorboard import EventFile
from r1jax.train.wandb_run import WandbRun

PLAIN_INTERVAL_S = 15.0


class Load(NamedTuple):
    """What one step asks of all devices."""

    tokens: int
    """Places of the decoder's sequences."""
    flops: int | float
    """Of the model, forward and backward."""
    peak: float | None
    """FLOP/s of all devices in the compute dtype; None where the hardware is not known."""


class Telemetry:
    """Writes figures of a run to files and shows how far it is."""

    def __init__(
        self,
        workdir: Path,
        *,
        steps: int,
        start: int,
        batch_size: int,
        load: Load | None = None,
        clock: Clock,
        remote: WandbRun | None = None,
    ) -> None:
        """Opens the files; rows after `start`, which a killed run had written, are dropped.

        Args:
          workdir: Run folder.
          steps: Steps of the whole run.
          start: Steps done already.
          batch_size: Cases a step.
          load: Of a step, for tokens and utilisation.
          clock: Of the run.
          remote: Gets the figures too.
        """
        self.steps, self.start, self.batch_size, self.load, self.clock = steps, start, batch_size, load, clock
        self.remote = remote
        clock.go_on(start)
        path = workdir / "metrics.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
        draft = path.with_suffix(".draft")
        draft.write_text("".join(row + "\n" for row in rows if _step_of(row) <= start))
        draft.replace(path)  # at once, so that a kill in between loses no row
        self.file = path.open("a", buffering=1)
        self.board = EventFile(workdir / "tensorboard", start)
        drop = SessionLog(status=SessionLog.START)  # tells TensorBoard to forget what a killed run wrote from here on
        self.board.write(Event(wall_time=time.time(), step=start + 1, session_log=drop))
        self.console = Console(stderr=True)
        self.began = self.spoke = self.measured = self.settled = time.perf_counter()
        self.measured_at = start
        self.waited = self.unsettled_wait = 0.0
        self.rated = self.starved = 0.0  # seconds of all rows of `rates`, and of waiting in them
        self.speed = ""
        self.progress = Progress(
            TextColumn("step"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            disable=not (self.console.is_terminal and is_first()),
        )
        self.bar = self.progress.add_task("", total=steps, completed=start)
        self.progress.start()

    def log(self, step: int, figures: Mapping[str, float | list[float]]) -> None:
        """Appends one row to metrics.jsonl and the same figures to TensorBoard.

        Args:
          step: Steps done.
          figures: Name to number, or to a list of numbers, which TensorBoard does not get.
        """
        self.file.write(json.dumps({"step": step, **figures}) + "\n")
        shown = {name.replace(".", "/", 1): value for name, value in figures.items() if not isinstance(value, list)}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in shown.items()]
        self.board.write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        if self.remote is not None:
            self.remote.log(step, figures)

    def advance(self, step: int, note: str) -> None:
        """Moves the progress view; a log file gets a plain line now and then instead.

        Args:
          step: Steps done.
          note: A few words, such as the loss.
        """
        now = time.perf_counter()
        rate = (step - self.start) / (now - self.began)
        text = f"{rate * self.batch_size:.0f} examples/s  {self.speed}{note}"
        self.progress.update(self.bar, completed=step, description=text)
        if self.progress.disable and (now - self.spoke > PLAIN_INTERVAL_S or step == self.steps):
            self.spoke = now
            left = (self.steps - step) / rate
            self.say(f"step {step}/{self.steps}  {int(left // 60)}:{int(left % 60):02d} left  {text}")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what happens inside as waiting for data."""
        began = time.perf_counter()
        yield
        waited = time.perf_counter() - began
        self.waited += waited
        self.unsettled_wait += waited

    def rates(self, step: int) -> dict[str, float]:
        """Speed since the last call or pause.

        Args:
          step: Steps done: the one that is being logged, whose result has been waited for, and maybe no other.

        Returns:
          "examples_per_second"; "tokens_per_second" and, on known hardware, "mfu", the model's FLOPs as a share of what
          the devices could do; "goodput"; memory peaks; "data_wait", the share of the time that went into waiting for
          the next batch. The device may have been busy meanwhile, so that it starves for at most this share.
        """
        now = time.perf_counter()
        steps, seconds = step - self.measured_at, now - self.measured
        found = {"examples_per_second": steps * self.batch_size / seconds, "data_wait": self.waited / seconds}
        if self.load is not None:
            found["tokens_per_second"] = steps * self.load.tokens / seconds
            self.speed = f"{found['tokens_per_second']:,.0f} tokens/s  "
            if self.load.peak is not None:
                found["mfu"] = steps * self.load.flops / seconds / self.load.peak
                self.speed += f"MFU {found['mfu']:.1%}  "
        self._settle()
        self.rated, self.starved = self.rated + seconds, self.starved + self.waited
        self.measured, self.measured_at, self.waited = now, step, 0.0
        return found | {"goodput": self.clock.goodput} | memory_peaks()

    @contextmanager
    def aside(self, step: int) -> Iterator[None]:
        """Leaves what happens inside (evaluation, saving) out of `rates` and of goodput.

        Args:
          step: Steps done; all of them have ended.
        """
        self._settle()
        yield
        self.measured = self.settled = time.perf_counter()
        self.measured_at, self.waited = step, 0.0

    def _settle(self) -> None:
        """Counts the time since the last call, without waiting, as useful."""
        now = time.perf_counter()
        self.clock.useful += max(0.0, now - self.settled - self.unsettled_wait)
        self.settled, self.unsettled_wait = now, 0.0

    def say(self, text: str) -> None:
        """Prints a line above the progress view, once for all processes."""
        if self.progress.disable:
            say(text)
        else:
            self.progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Flushes the files and ends the view."""
        self.progress.stop()
        self.board.close()
        self.file.close()
        self.clock.write()
        if self.remote is not None:
            self.remote.close()


def memory_peaks() -> dict[str, float]:
    """The most memory that was ever in use.

    Returns:
      "host_memory_peak_bytes", of this process; "device_memory_peak_bytes", of the fullest device, where devices tell.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"host_memory_peak_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}
    told = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in told if peak is not None]
    return found | ({"device_memory_peak_bytes": float(max(known))} if known else {})


def _step_of(row: str) -> float:
    """Step of a metrics row; a row that a crash cut short is never kept."""
    try:
        content: Any = json.loads(row)
    except json.JSONDecodeError:
        return float("inf")
    return float(content["step"])
