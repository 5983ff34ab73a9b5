"""Batches from this process or from workers, whose deaths and errors come out as one clear message."""

import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from r1jax.errors import UserError

POLL_S = 1.0
"""How often a wait for a batch looks whether the workers live."""
GRACE_S = 10.0
"""How long a dead worker's last batches are waited for."""
WORKER = "grain-process-prefetch"
"""How the names of grain's worker processes begin."""


class Read(NamedTuple):
    """What reading a batch gives."""

    batch: dict[str, np.ndarray]
    process: int
    """Id of the process that read it."""
    counters: dict[str, float]
    """Of that process's source, summed since it was opened; empty where it counts nothing."""


class Batches(Iterator[dict[str, np.ndarray]]):
    """Collated batches, and what their source has counted so far."""

    def __init__(self, iterator: Any) -> None:
        """Takes over the iterator.

        Args:
          iterator: Gives a `Read` a batch; is closed with this.
        """
        self.iterator = iterator
        self._counted: dict[int, dict[str, float]] = {}

    def __next__(self) -> dict[str, np.ndarray]:
        read = self._next()
        self._counted[read.process] = read.counters
        return read.batch

    def counters(self) -> dict[str, float]:
        """Sums over the processes that have read, by name, as of the last batch of each."""
        total: dict[str, float] = {}
        for counted in self._counted.values():
            for name, value in counted.items():
                total[name] = total.get(name, 0.0) + float(value)
        return total

    def close(self) -> None:
        """Ends threads and workers."""
        self.iterator.close()

    def _next(self) -> Read:
        return next(self.iterator)


class WorkerBatches(Batches):
    """Batches from worker processes.

    A worker that dies in the middle of a message leaves its reader blocked for ever, so a thread reads, and this
    process only waits for it as long as all workers live.
    """

    def __init__(self, iterator: Any, workers: int) -> None:
        """Starts the thread that reads; the workers start with the first batch.

        Args:
          iterator: Of grain, with its workers.
          workers: How many there will be.
        """
        super().__init__(iterator)
        self.workers = workers
        self._others = set(multiprocessing.active_children())
        self._known: dict[int, Any] = {}
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[Read | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, daemon=True, name="r1jax-batches")
        self._thread.start()

    def close(self) -> None:
        """Ends the workers; they finish the batch that they are at."""
        self._wanted.put(False)
        self._thread.join(2 * GRACE_S)
        for worker in self._look():
            if worker.is_alive():  # neither signals nor wishes reach it
                worker.kill()

    def _serve(self) -> None:
        """Reads a batch a wish, until there is a wish to end."""
        try:
            while self._wanted.get():
                try:
                    self._found.put(next(self.iterator))
                except BaseException as error:
                    self._found.put(error)
        finally:
            self.iterator.close()

    def _next(self) -> Read:
        self._wanted.put(True)
        dead_since = None
        while True:
            try:
                found = self._found.get(timeout=POLL_S)
            except queue.Empty:
                dead = next((worker for worker in self._look() if worker.exitcode is not None), None)
                if dead is not None:
                    dead_since = dead_since or time.monotonic()
                    if time.monotonic() - dead_since > GRACE_S:
                        self._refuse(dead)
                continue
            self._look()
            if isinstance(found, Read):
                return found
            dead = next((worker for worker in self._known.values() if worker.exitcode), None)  # after an error it is 0
            if dead is not None and not isinstance(found, UserError):
                self._refuse(dead)
            raise found

    def _look(self) -> list[Any]:
        """Worker processes seen so far, the dead ones too."""
        for process in multiprocessing.active_children():
            if process.name.startswith(WORKER) and process not in self._others:
                self._known[process.pid] = process
        return list(self._known.values())

    def _refuse(self, dead: Any) -> None:
        """Ends the other workers and says which one died."""
        for worker in self._known.values():
            worker.kill()
        if dead.exitcode < 0:
            how = f"was killed by {signal.Signals(-dead.exitcode).name}"
        else:
            how = f"ended with exit code {dead.exitcode} (why stands above)"
        raise UserError(
            f"a worker that reads data (process {dead.pid}, one of data.workers {self.workers}) {how}: run the same "
            "command again, it goes on from the last checkpoint; if memory ran out, lower data.workers or data.ahead"
        )


class Portable:
    """Runs a function in a worker; what it raises there can be sent to this process."""

    def __init__(self, function: Callable[[int], Read]) -> None:
        """Wraps a function.

        Args:
          function: To be run in the worker.
        """
        self.function = function

    def __call__(self, k: int) -> Read:
        """Runs it.

        Raises:
          UserError: As it was raised.
          RuntimeError: In place of an error that cannot be pickled, which would never arrive.
        """
        try:
            return self.function(k)
        except Exception as error:
            try:
                pickle.loads(pickle.dumps(error))
            except Exception:
                raise RuntimeError("".join(traceback.format_exception(error))) from None
            raise


def worker_batches(numbers: Any, reader: Callable[[int], Read], options: Any, workers: int) -> WorkerBatches:
    """Batches that spawned processes read.

    Args:
      numbers: Dataset of batch numbers.
      reader: Reads a batch; travels to the workers.
      options: grain's `ReadOptions` of each worker.
      workers: How many.

    Returns:
      The batches, in the order of their numbers.
    """
    if not flags.FLAGS.is_parsed():  # grain 0.2.18 asks for a flag of absl, which no absl.app has parsed here
        flags.FLAGS.mark_as_parsed()
    dataset = numbers.map(Portable(reader)).to_iter_dataset(options)
    # Through pipes, not shared memory: a container has 64 MB of that by default, and killed processes leave theirs.
    whole = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
    dataset = grain.experimental.WithOptionsIterDataset(dataset, whole)
    processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    return WorkerBatches(iter(dataset.mp_prefetch(processes, worker_init_fn=start_worker)), workers)


def start_worker(index: int, count: int) -> None:
    """Prepares a worker process, before the source is unpickled in it.

    Args:
      index: Which worker.
      count: How many there are.
    """
    # A terminal and a scheduler signal all processes; the training process decides when it has saved.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.environ["JAX_PLATFORMS"] = "cpu"  # a preprocessor that uses JAX must not take the memory of the GPU
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True, name="r1jax-follow").start()
