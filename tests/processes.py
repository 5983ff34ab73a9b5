"""Starts a script in several processes that find each other on this machine, as srun or mpirun would."""

import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
FAST += " --xla_cpu_parallel_codegen_split_count=1"  # the workers are as many as the cores
"""Programs that are compiled in a third of the time."""
if version("jaxlib").startswith("0.10."):  # later ones have no other way to emit loops, and refuse the flag
    FAST += " --xla_cpu_use_fusion_emitters=false"


def environment(devices: int, cache: Path) -> dict[str, str]:
    """Variables of a process with so many CPU devices."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": FAST,
        "PYTHONPATH": str(ROOT),
    }


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def places(processes: int) -> list[tuple[object, ...]]:
    """Flags that each process is told where it stands by; one alone needs none."""
    if processes == 1:
        return [()]
    common = ("--launch.coordinator", f"localhost:{free_port()}", "--launch.processes", processes)
    return [(*common, "--launch.process", i) for i in range(processes)]


def start(folder: Path, script: Path, processes: int, devices: int, *flags: object) -> list[subprocess.Popen]:
    """Starts a script that takes the flags of `launch`, or once without them.

    Args:
      folder: Process i writes out.i and err.i there; the cache of programs lies beside it.
      script: Python file.
      processes: How many.
      devices: CPU devices of each.
      *flags: Words of the command line.

    Returns:
      The processes, in their order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = []
    for i, place in enumerate(places(processes)):
        words = [sys.executable, str(script), *map(str, (*flags, *place))]
        with (folder / f"out.{i}").open("w") as out, (folder / f"err.{i}").open("w") as err:
            env = environment(devices, folder.parent / "xla")
            started.append(subprocess.Popen(words, stdout=out, stderr=err, cwd=ROOT, env=env))
    return started


def finish(started: list[Any], folder: Path, seconds: float = 280) -> tuple[list[int], list[str]]:
    """Waits for all.

    Returns:
      Exit codes, and what each wrote on stderr.
    """
    try:
        codes = [process.wait(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    return codes, [(folder / f"err.{i}").read_text() for i in range(len(started))]
