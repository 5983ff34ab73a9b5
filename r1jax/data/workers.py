"""Batches from this process or from worker processes, whose deaths and errors come out as one clear message.

grain reads in threads, here and in the workers. Its own worker processes (`mp_prefetch` of 0.2.18) are not used: they
answer through queues whose writing end this process holds too, so that a worker killed amid a message is waited for
without end. Here every worker has a pipe of its own, which ends when the worker does.
"""

import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import cloudpickle
import grain
import numpy as np

from r1jax.errors import UserError


class Read(NamedTuple):
    """What reading a batch gives."""

    batch: dict[str, np.ndarray]
    process: int
    """Id of the process that read it."""
    counters: dict[str, float]
    """Of that process's source, summed since it was opened; empty where it counts nothing."""


def read_in_threads(read: Callable[[int], Read], start: int, stride: int, threads: int) -> Any:
    """Reads batches in the order of their numbers, some of them ahead.

    Args:
      read: Reads a batch, in any thread.
      start: First batch.
      stride: From one batch to the next.
      threads: How many read.

    Returns:
      Iterator of grain, endless; to be closed.
    """
    numbers = grain.MapDataset.range(start, sys.maxsize, stride)
    # Two batches a thread: the default buffers 500 elements, which are batches here.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(numbers.map(read).to_iter_dataset(options))


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
        read = next(self.iterator)
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


class Workers(Iterator[Read]):
    """Processes that read every n-th batch each; a thread receives in turn, so that the next batch is here in time."""

    def __init__(self, read: Callable[[int], Read], start: int, threads: int, workers: int) -> None:
        """Spawns the processes.

        Args:
          read: Reads a batch; a copy of it travels to each worker.
          start: First batch.
          threads: Reading threads of each worker.
          workers: How many.
        """
        context, payload = multiprocessing.get_context("spawn"), cloudpickle.dumps(read)
        self.processes, self.pipes = [], []
        self.found: queue.Queue[Read | BaseException] = queue.Queue(maxsize=1)
        self.stop = threading.Event()
        self._end = weakref.finalize(self, _end, self.stop, self.processes)  # before the exit waits for the workers
        for i in range(workers):
            ours, theirs = context.Pipe(duplex=False)
            work = (payload, theirs, start + i, workers, threads)
            process = context.Process(target=run_worker, args=work, daemon=True, name=f"r1jax-data-{i}")
            process.start()
            theirs.close()  # the only other end is the worker's: its death ends the pipe
            self.processes.append(process)
            self.pipes.append(ours)
        arguments = (self.processes, self.pipes, self.found, self.stop)
        self.thread = threading.Thread(target=_receive, args=arguments, daemon=True, name="r1jax-data-receive")
        self.thread.start()

    def __next__(self) -> Read:
        found = self.found.get()
        if isinstance(found, Read):
            return found
        self.found.put(found)  # whoever asks again gets the same answer
        raise found

    def close(self) -> None:
        """Ends the workers at once: they only read."""
        self._end()
        self.thread.join()
        for pipe in self.pipes:
            pipe.close()


def _end(stop: threading.Event, processes: list[Any]) -> None:
    stop.set()
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _receive(processes: list[Any], pipes: list[Connection], found: queue.Queue, stop: threading.Event) -> None:
    """Passes on what the workers send, in turn, until one fails or it is stopped."""
    turn, message = 0, None
    while not (stop.is_set() or isinstance(message, BaseException)):
        try:
            message = pickle.loads(pipes[turn].recv_bytes())
        except (EOFError, OSError):
            if stop.is_set():
                return
            message = _death(processes[turn], turn, len(pipes))
        except Exception as error:  # a class that cannot be unpickled here
            message = error
        while not stop.is_set():
            try:
                found.put(message, timeout=0.1)
                break
            except queue.Full:
                continue
        turn = (turn + 1) % len(pipes)


def _death(process: Any, turn: int, workers: int) -> UserError:
    process.join()
    code = process.exitcode or 0  # None where the main thread, which closes all this, has been told first
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    else:
        how = f"ended with exit code {code}, why stands above"
    return UserError(
        f"data worker {turn + 1} of {workers} (process {process.pid}) {how}: run the same command again, it goes on "
        "from the last checkpoint; if memory ran out, lower data.workers, data.threads or data.ahead"
    )


def run_worker(payload: bytes, pipe: Connection, start: int, stride: int, threads: int) -> None:
    """Reads and sends batches until nobody reads them any more; the main function of a worker process.

    Args:
      payload: The reading function, pickled.
      pipe: To the training process.
      start: First batch of this worker.
      stride: From one of its batches to the next.
      threads: How many read.
    """
    # A terminal and a scheduler signal all processes; the training process decides when it has saved.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.environ["JAX_PLATFORMS"] = "cpu"  # a preprocessor that uses JAX must not take the memory of the GPU
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    threading.Thread(target=_follow, daemon=True, name="r1jax-data-follow").start()
    try:
        for read in read_in_threads(cloudpickle.loads(payload), start, stride, threads):
            pipe.send_bytes(pickle.dumps(read, protocol=5))
    except BrokenPipeError:
        pass
    except Exception as error:
        pipe.send_bytes(_portable(error))
    pipe.close()
    os._exit(0)  # without waiting for threads that read ahead


def _follow() -> None:
    """Ends this process when the one that started it has ended, however it did."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _portable(error: Exception) -> bytes:
    """The error, or, where it cannot travel, its text."""
    try:
        stored = pickle.dumps(error)
        pickle.loads(stored)
    except Exception:
        stored = pickle.dumps(RuntimeError("".join(traceback.format_exception(error))))
    return stored
