"""Requests to a server that end: in threads, tried again for a while, and given up after a stated time."""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from r1jax.errors import IN_CLIENTS, UserError

TIMEOUT_S = 30.0
"""Longest wait for a server that does not answer, restarts included; then reading ends with an error."""
SLOWEST = 2**20
"""Bytes a second below which a server counts as one that does not answer."""
THREADS = 8
"""Requests to a server at a time."""
PAUSE_S = 0.5
FAILURES = (OSError, RuntimeError, ValueError)
"""What the clients raise: pyarrow OSError and ValueError, hdfs-native RuntimeError."""
T = TypeVar("T")


def bounded(labels: Sequence[str], calls: Sequence[Callable[[], T]], size: int = 0) -> list[T]:
    """Runs requests, several at a time; one that fails is tried again until time is up.

    A server that restarts is so not noticed, and one that is gone costs `TIMEOUT_S` (more for many bytes).

    Args:
      labels: What each is about, for the error.
      calls: May be called again after a failure.
      size: Bytes that they move.

    Returns:
      Results in order.

    Raises:
      UserError: A call failed for good, or there was no answer in time.
    """
    return _Requests(labels, calls, time.monotonic() + TIMEOUT_S + size / SLOWEST).run()


class _Requests(Generic[T]):
    """Requests under way to one server; daemon threads, because one that never answers must not hold the program."""

    def __init__(self, labels: Sequence[str], calls: Sequence[Callable[[], T]], end: float) -> None:
        self.labels, self.calls, self.end = labels, calls, end
        self.results: dict[int, T] = {}
        self.failure: tuple[int, BaseException] | None = None
        self.waiting = list(range(len(calls)))[::-1]
        self.running: set[int] = set()
        self.changed = threading.Condition()
        self.latest: BaseException | None = None

    def run(self) -> list[T]:
        """Waits for all of them."""
        for _ in range(min(THREADS, len(self.calls))):
            thread = threading.Thread(target=self._work, name="r1jax-request", daemon=True)
            IN_CLIENTS.add(thread)
            thread.start()
        with self.changed:
            while len(self.results) < len(self.calls) and self.failure is None:
                left = self.end - time.monotonic()
                if left <= 0 or not self.changed.wait(left):
                    index = min(self.running, default=0)
                    why = f" ({reason(self.latest)})" if self.latest else ""
                    self.failure = (index, TimeoutError(f"no answer within {TIMEOUT_S:g} s{why}"))
        if self.failure is None:
            return [self.results[index] for index in range(len(self.calls))]
        index, error = self.failure
        if isinstance(error, UserError) or not isinstance(error, FAILURES):
            raise error
        mend = (
            "check its name" if isinstance(error, FileNotFoundError) else "check the server and run the command again"
        )
        raise UserError(f"{self.labels[index]}: {reason(error)}: {mend}") from error

    def _work(self) -> None:
        while True:
            with self.changed:
                if not self.waiting or self.failure is not None:
                    return
                index = self.waiting.pop()
                self.running.add(index)
            result, error = self._try(index)
            with self.changed:
                self.running.discard(index)
                if error is None:
                    self.results[index] = result
                elif self.failure is None:
                    self.failure = (index, error)
                self.changed.notify_all()

    def _try(self, index: int) -> tuple[T | None, BaseException | None]:
        """Calls until it succeeds, the error is none that time mends, or time is up."""
        while True:
            try:
                return self.calls[index](), None
            except FAILURES as error:
                lasting = isinstance(error, FileNotFoundError | PermissionError | ValueError | UserError)
                if lasting or time.monotonic() + PAUSE_S >= self.end or self.failure is not None:
                    return None, error
                with self.changed:
                    first, self.latest = self.latest is None, error
                if first:
                    label, left = self.labels[index], self.end - time.monotonic()
                    print(f"{label}: {reason(error)}; trying again for {left:.0f} s", file=sys.stderr, flush=True)
                time.sleep(PAUSE_S)
            except BaseException as error:
                return None, error


def reason(error: BaseException) -> str:
    """Shortens a message: some clients print whole structures.

    Args:
      error: What was raised.

    Returns:
      One line of up to 200 characters.
    """
    text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0].partition(": [")[0]
    text = text.replace('("', ": ", 1)  # of `Kind("what": [everything]...)`
    return text if len(text) <= 200 else f"{text[:200]}..."
