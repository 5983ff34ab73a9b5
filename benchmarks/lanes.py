"""Processes side by side that share GPUs, cores and compiled programs; some wait for what others make."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.children import SETTINGS  # noqa: E402


class Ended(NamedTuple):
    """A process that has ended."""

    name: str
    code: int
    seconds: float


class _Running(NamedTuple):
    process: subprocess.Popen[bytes]
    began: float
    slot: int


def run_lanes(
    commands: Mapping[str, Sequence[str]],
    ready: Callable[[str], bool],
    *,
    jobs: int,
    gpus: int,
    logs: Path,
    ahead: frozenset[str] = frozenset(),
) -> Iterator[Ended | None]:
    """Runs processes, at most `jobs` at once, in their order as far as they are ready.

    Args:
      commands: Words that start each process, of Python.
      ready: Whether a process may start; asked again and again.
      jobs: How many at once.
      gpus: A process has one of so many; 0 leaves the choice to it.
      logs: Folder for what each prints.
      ahead: Processes that may use all cores; each other one has an even share of them.

    Yields:
      Each process that has ended, and None a few times a second. What never gets ready is left out.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, running = dict(commands), dict[str, _Running]()
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // jobs)
    try:
        while waiting or running:
            free = [slot for slot in range(jobs) if slot not in {one.slot for one in running.values()}]
            startable = (name for name in list(waiting) if ready(name))
            for slot, name in zip(free, startable, strict=False):
                process = _start(waiting.pop(name), logs / f"{name}.log", str(slot % gpus) if gpus else None)
                if name not in ahead:
                    first = slot * share % len(cores)
                    os.sched_setaffinity(process.pid, cores[first : first + share])
                running[name] = _Running(process, time.monotonic(), slot)
            yield None
            for name, one in list(running.items()):
                if one.process.poll() is not None:
                    yield Ended(name, one.process.returncode, time.monotonic() - running.pop(name).began)
            if waiting and not running and not any(map(ready, waiting)):
                return
            time.sleep(0.1)
    finally:
        for one in running.values():
            one.process.terminate()
        for one in running.values():
            one.process.wait()


def _start(words: Sequence[str], log: Path, gpu: str | None) -> subprocess.Popen[bytes]:
    env = SETTINGS | dict(os.environ) | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    with log.open("ab") as stream:
        return subprocess.Popen([sys.executable, *words], stdout=stream, stderr=subprocess.STDOUT, env=env)
