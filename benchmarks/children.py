"""Variants of a benchmark in processes of their own: a peak of memory is the variant's, and so is a crash.

First all compile, several at once, into JAX's cache of compiled programs. Then each is measured while nothing else
computes; the next ones start meanwhile, find their programs in the cache, and wait for their turn.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from r1jax.errors import UserError

QUOTED = 600
"""Characters of a crashed process's last words that are kept."""
SETTINGS = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # one that waits its turn must not hold the memory
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
}
"""Environment of the processes, where the caller's says nothing."""


class Child(NamedTuple):
    """One process."""

    process: subprocess.Popen[str]
    log: Path


def wait_for_turn() -> None:
    """Called by a process that is ready to be measured; returns when nothing else computes."""
    sys.stdin.readline()


def tell(result: Mapping[str, Any]) -> None:
    """Called by a process at its end."""
    print(json.dumps(result), flush=True)


def run_at_once(
    commands: Mapping[str, Sequence[str]], *, jobs: int, timeout: float, devices: int = 1
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs processes side by side.

    Args:
      commands: Words that start each process.
      jobs: How many at once, on each device.
      timeout: Seconds that each may take.
      devices: Over how many GPUs they are spread, of those that `CUDA_VISIBLE_DEVICES` names or else the first of
        this host; with one, each process sees what its caller sees.

    Yields:
      Name and what the process told, or {"error": why it told nothing}, as they end.

    Raises:
      UserError: There are fewer GPUs to take than `devices`.
    """
    with tempfile.TemporaryDirectory() as folder:
        waiting, running = dict(commands), dict[str, Child]()
        began: dict[str, float] = {}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(devices)))).split(",")
        if len(visible) < devices > 1:
            raise UserError(
                f"--devices is {devices}, but CUDA_VISIBLE_DEVICES names {len(visible)}: {','.join(visible)}"
            )
        places, taken = visible[:devices] * jobs, dict[str, str]()
        while waiting or running:
            while waiting and places:
                name = next(iter(waiting))
                taken[name] = places.pop(0)
                alone = {"CUDA_VISIBLE_DEVICES": taken[name]} if devices > 1 else {}
                running[name], began[name] = _start(waiting.pop(name), folder, alone), time.monotonic()
            time.sleep(0.05)
            for name, child in list(running.items()):
                if child.process.poll() is not None or time.monotonic() - began[name] > timeout:
                    child.process.kill()  # of one that has ended, this does nothing
                    places.append(taken.pop(name))
                    yield name, _finish(running.pop(name), timeout)


def run_in_turn(
    commands: Mapping[str, Sequence[str]], *, ahead: int, timeout: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measures processes one after the other, in their order; each calls `wait_for_turn` once it is ready.

    Args:
      commands: Words that start each process.
      ahead: How many get ready while one is measured.
      timeout: Seconds from the start of a turn to the end of the process.

    Yields:
      Name and what the process told, or {"error": why it told nothing}.
    """
    with tempfile.TemporaryDirectory() as folder:
        waiting, started = dict(commands), dict[str, Child]()
        try:
            while waiting or started:
                while waiting and len(started) <= ahead:
                    name = next(iter(waiting))
                    started[name] = _start(waiting.pop(name), folder, {})
                name = next(iter(started))
                yield name, _finish(started.pop(name), timeout)
        finally:
            for child in started.values():
                child.process.kill()
                child.process.communicate()


def _start(words: Sequence[str], folder: str, more: Mapping[str, str]) -> Child:
    descriptor, log = tempfile.mkstemp(dir=folder)
    with os.fdopen(descriptor, "w") as stderr:
        pipe, settings = subprocess.PIPE, {**SETTINGS, **os.environ, **more}
        process = subprocess.Popen(
            [sys.executable, *words], stdin=pipe, stdout=pipe, stderr=stderr, text=True, env=settings
        )
    return Child(process, Path(log))


def _finish(child: Child, timeout: float) -> dict[str, Any]:
    """Gives a process its turn and takes what it tells."""
    timer = threading.Timer(timeout, child.process.kill)
    timer.start()
    try:
        told, _ = child.process.communicate("\n")
    finally:
        timer.cancel()
    if child.process.returncode == 0:
        return json.loads(told.splitlines()[-1])
    late = child.process.returncode == -9
    reason = f"killed, after {timeout:.0f} s or by the system" if late else f"exit code {child.process.returncode}"
    words = child.log.read_text(errors="replace").strip()
    return {"error": f"{reason}: {words[-QUOTED:]}"}


def follow(
    process: subprocess.Popen[str], names: list[str], patience: float, end: float, note: Callable[[dict], None]
) -> list[str]:
    """Notes the rows of a process that measures cases, and ends it where it says nothing for too long.

    Args:
      process: Prints a line of JSON before each case, {"begin": name}, and its row after it; its output is piped.
      names: Cases that it was given.
      patience: Seconds without a word after which it is killed.
      end: When it is killed in any case, by `time.monotonic`.
      note: Called with each row.

    Returns:
      The cases that are left to do after the one that ended it, which is noted as refused.
    """
    told: list[str] = []
    reader = threading.Thread(target=lambda: told.extend(process.stderr), daemon=True)
    reader.start()
    current, left = names[0], list(names)

    def watch() -> threading.Timer:
        timer = threading.Timer(max(0.0, min(patience, end - time.monotonic())), process.kill)
        timer.start()
        return timer

    timer = watch()
    for line in process.stdout:
        timer.cancel()
        timer = watch()
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "begin" in row:
            current = row["begin"]
        else:
            note(row)
            left.remove(row["name"])
    timer.cancel()
    process.wait()
    reader.join(60)  # a process that it started may hold the pipe open
    if left:
        last = " ".join("".join(told).split())[-400:]
        note({"name": current, "refused": f"process ended with {process.returncode}: {last}"})
        left.remove(current)
    return left


def told_command() -> str:
    """How this script was called, as a shell takes it; paths of this machine are told by their last name."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_without_folders, sys.argv[1:])])


def _without_folders(word: str) -> str:
    """A word of a command with whatever begins like a path cut down to its name: the word, or a value within it."""
    if word.startswith("/"):
        return Path(word).name
    return re.sub(r"(?<=[\s=,])/[^\s=,]*|(?<![^\s=,])(?:~|\.{1,2})/[^\s=,]*", lambda path: Path(path[0]).name, word)


def compare(
    args: argparse.Namespace,
    script: str,
    part: str,
    numbers: Sequence[int],
    train_variant: Callable[[str, int, argparse.Namespace], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    prepare: Callable[[argparse.Namespace], None],
) -> None:
    """Trains every variant once for each number, in processes of their own, and writes each result as it comes.

    Args:
      args: With the options of `variant_options` and `output`.
      script: The command, which these processes start again.
      part: What the numbers count; the key of a run.
      numbers: Of which there is a run of each variant.
      train_variant: Variant, number and `args`, to {"run": ..., "environment": ...}.
      table: Of a report.
      prepare: Called before the first process starts.
    """
    if child := vars(args).pop("child"):
        del sys.argv[1:4]  # the command that is told is the parent's
        with contextlib.redirect_stdout(sys.stderr):  # a pipe that is read at the end holds no long run's words
            told = train_variant(child[0], int(child[1]), args)
        tell(told)
        return
    prepare(args)
    began, runs, failed = time.perf_counter(), [], []
    names = {f"{name or 'as it is'}, {part} {number}": (name, number) for number in numbers for name in args.variants}
    commands = {key: [script, "--child", name, str(number), *sys.argv[1:]] for key, (name, number) in names.items()}
    environment: dict[str, Any] = {}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for key, told in run_at_once(commands, jobs=args.jobs, timeout=args.timeout, devices=args.devices):
        if "error" in told:
            print(f"{key}: {told['error']}", flush=True)
            failed.append(key)
            continue
        runs.append(told["run"])
        runs.sort(key=lambda run: (args.variants.index(run["variant"]), run[part]))
        versions = environment.get("versions", {}) | told["environment"]["versions"]
        environment |= told["environment"] | {"versions": versions}
        report = environment | {"seconds": time.perf_counter() - began, "runs": runs}
        args.output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{key}: {told['run']['figures']} after {report['seconds']:.0f} s", flush=True)
    if runs:
        print(table({"runs": runs}))
    if failed:
        sys.exit(f"without {', '.join(failed)} (above)")


def variant_options(parser: argparse.ArgumentParser, variants: str) -> None:
    """Adds what `compare` reads, but for the numbers; `variants` is the help on them."""
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("--variants", nargs="+", required=True, help=variants)
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side on each device")
    parser.add_argument("--devices", type=int, default=1, help="GPUs over which they are spread")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that each may take")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="overrides of train.py for all variants, after --")
