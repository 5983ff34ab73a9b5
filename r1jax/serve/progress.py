"""How far a long piece of work is: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_INTERVAL_S = 15.0


class Steps:
    """Counts what is done."""

    def __init__(self, what: str, total: int, bar: Progress) -> None:
        """Starts at 0.

        Args:
          what: Shown in front.
          total: All there is to do.
          bar: Where it is shown; a disabled one makes it plain lines.
        """
        self.what, self.total, self.bar, self.done = what, total, bar, 0
        self.task = bar.add_task(what, total=total)
        self.began = self.spoke = time.perf_counter()

    def advance(self, by: int = 1) -> None:
        """Counts on.

        Args:
          by: What was done since the last call.
        """
        self.done = min(self.done + by, self.total)
        self.bar.update(self.task, completed=self.done)
        now = time.perf_counter()
        if self.bar.disable and (self.done == self.total or now - self.spoke > PLAIN_INTERVAL_S):
            self.spoke = now
            left = (now - self.began) * (self.total - self.done) / max(self.done, 1)
            ahead = f", about {left:.0f} s to go" if self.done < self.total else ""
            print(f"{self.what} {self.done}/{self.total}, {now - self.began:.0f} s{ahead}", file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, total: int) -> Iterator[Steps]:
    """Shows progress on stderr while the block runs.

    Args:
      what: A word or two.
      total: All there is to do.

    Yields:
      The counter.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=console, disable=not console.is_terminal)
    with bar:
        yield Steps(what, total, bar)


@contextmanager
def percent(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows on stderr which share is done while the block runs.

    Args:
      what: A word or two.

    Yields:
      Takes what is done and all there is, for example bytes.
    """
    with progress(f"{what}, %", 100) as steps:
        yield lambda done, total: steps.advance(100 * done // total - steps.done)
