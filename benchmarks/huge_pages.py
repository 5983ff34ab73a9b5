"""The default run's first steps with memory in small and in huge pages, in turn: processor time, faults, speed.

    python benchmarks/huge_pages.py --output huge_pages.json

Needs a CPU whose Linux gives huge pages to those who ask. Programs are compiled before, in a run that does not count,
so that what differs is how steps and cases come by their memory. The cases drawn are the same, and so are the losses,
which are compared.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

from benchmarks.h100 import environment  # noqa: E402
from r1jax.errors import UserError, run_main  # noqa: E402
from r1jax.huge_pages import TUNABLE, VARIABLE, with_huge_pages  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
WAYS = {"small pages": 0, "huge pages": 1}


def measure(tunable: int, steps: int) -> dict[str, Any]:
    """Trains for some steps in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--config", "configs/medical.py", "--platform", "cpu", "--workdir", folder, "--train.steps", steps]
        words += ["--train.warmup_steps", 10, "--train.eval_every", steps, "--train.log_every", 5]
        words += ["--data.train_cases", 32 * steps, "--data.val_cases", 32, "--data.test_cases", 32]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            [sys.executable, "train.py", *map(str, words)],
            cwd=ROOT,
            env=os.environ | {VARIABLE: f"{TUNABLE}={tunable}"},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise UserError(f"training ended with code {done.returncode}: {done.stderr.strip()[-200:]}")
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    steady = [row["examples_per_second"] for row in rows if "examples_per_second" in row][2:]
    return {
        "seconds": seconds,
        "user_seconds": after.ru_utime - before.ru_utime,
        "system_seconds": after.ru_stime - before.ru_stime,
        "faults": after.ru_minflt - before.ru_minflt,
        "examples_per_second": float(np.median(steady)),
        "losses": [row["loss"] for row in rows if "loss" in row],
    }


def table(report: dict) -> str:
    """The table of benchmarks/README.md."""
    lines = [
        "| pages | examples/s | processor seconds, user + system | faults | all seconds |",
        "|---|---|---|---|---|",
    ]
    for name, runs in report["results"].items():
        rate, user, system, faults, wall = (
            np.median([run[key] for run in runs])
            for key in ("examples_per_second", "user_seconds", "system_seconds", "faults", "seconds")
        )
        least, most = (f([run["examples_per_second"] for run in runs]) for f in (min, max))
        cells = f"{rate:.0f} ({least:.0f} to {most:.0f}) | {user:.0f} + {system:.0f} | {faults:,.0f} | {wall:.0f}"
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Measures both ways in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way, in turn")
    parser.add_argument("--steps", type=int, default=100, help="of a run, of 32 cases each")
    args = parser.parse_args(arguments)
    if with_huge_pages("") is None:
        raise UserError("huge pages: this C library or kernel gives none, or gives them unasked; nothing to compare")
    measure(1, args.steps)  # compiles
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    told = environment()
    of_gpus = ("jax-cuda13-plugin", "nvidia-cudnn-cu13", "torch", "transformers")
    report = {
        "command": " ".join(["python benchmarks/huge_pages.py", *arguments]),
        "hardware": told["hardware"],
        "versions": {name: version for name, version in told["versions"].items() if name not in of_gpus},
        "results": results,
    }
    for _ in range(args.rounds):
        for name, tunable in WAYS.items():
            results[name].append(measure(tunable, args.steps))
            print(name, {k: v for k, v in results[name][-1].items() if k != "losses"}, file=sys.stderr, flush=True)
            args.output.write_text(json.dumps(report, indent=1) + "\n")
    losses = [run["losses"] for runs in results.values() for run in runs]
    if any(one != losses[0] for one in losses):
        raise UserError(f"{args.output}: the ways do not train alike")
    print(table(report))


if __name__ == "__main__":
    run_main(main)
