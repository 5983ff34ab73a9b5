"""A medical checkpoint on one CPU core: LiteRT and IREE beside jitted JAX, in one run, the ways taking turns.

    python benchmarks/edge.py --checkpoint runs/medical --converter PYTHON --device PYTHON \\
        --output benchmarks/results/edge.json

--converter has the LiteRT converter (docs/export.md), --device has ai-edge-litert and nothing of r1jax; --compiler has
the IREE compiler, --iree has iree-base-runtime, and without these two IREE is left out. A way whose export is refused,
as that of int8 weights may be, is left out, and the command says so.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import jax_environment  # noqa: E402
from r1jax.errors import UserError  # noqa: E402
from r1jax.serve.export_command import export  # noqa: E402
from r1jax.serve.export_graph import Port  # noqa: E402
from r1jax.serve.export_medical import raw_inputs  # noqa: E402
from r1jax.tasks.medical.task import Medical  # noqa: E402
from r1jax.train.checkpoints import find_checkpoint  # noqa: E402

CHILD = Path(__file__).with_name("edge_child.py")
ONE_THREAD = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}


class Way(NamedTuple):
    """How a case is predicted."""

    kind: str
    """Of edge_child.py."""
    python: str
    folder: Path


class Running:
    """A process that has predicted its first case; by default one of edge_child.py."""

    def __init__(self, way: Way, inputs: Path, core: int, child: Path | None = None) -> None:
        words = [way.python, str(child or CHILD), way.kind, str(way.folder), str(inputs), str(core)]
        began, pipe = time.perf_counter(), subprocess.PIPE
        environment = ONE_THREAD | {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=environment)
        assert self.process.stdout.readline() == "ready\n", f"{way} failed"
        self.cold_start_s = time.perf_counter() - began

    def predict(self, times: int) -> list[float]:
        """Milliseconds of each call."""
        self.process.stdin.write(f"{times}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> dict[str, int]:
        """What the process took."""
        told, _ = self.process.communicate()
        return json.loads(told)


def export_all(args: argparse.Namespace, place: Path) -> dict[str, Way]:
    """Exports the checkpoint every way that agrees with it; what int8 weights lead to may be refused."""
    words = ["--checkpoint", str(args.checkpoint), "--cases", str(args.cases)]
    edge = ["--to", "litert", "--converter", str(args.converter)]
    for name, more in (("fp32", edge), ("fp16", [*edge, "--weights", "fp16"]), ("jax", [])):
        export([*words, "--output", str(place / name), *more])
    may_fail = {"int8": [*edge, "--weights", "int8"]}
    if args.compiler:
        may_fail["iree"] = ["--to", "iree", "--converter", str(args.compiler)]
    for name, more in may_fail.items():
        try:
            export([*words, "--output", str(place / name), *more])
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    ways = {
        "checkpoint, jitted JAX fp32": Way("checkpoint", sys.executable, args.checkpoint.absolute()),
        "exported, JAX": Way("exported", sys.executable, place / "jax"),
        "exported, LiteRT fp32": Way("litert", str(args.device), place / "fp32"),
        "exported, LiteRT fp16": Way("litert", str(args.device), place / "fp16"),
        "exported, LiteRT int8": Way("litert", str(args.device), place / "int8"),
        "exported, IREE fp32": Way("iree", str(args.iree), place / "iree"),
    }
    return {name: way for name, way in ways.items() if way.folder.exists()}


def one_case(args: argparse.Namespace, card: dict[str, Any], file: Path) -> None:
    """Writes the inputs of one generated case."""
    config = find_checkpoint(args.checkpoint).config()
    wanted = {name: Port(**port | {"shape": tuple(port["shape"])}) for name, port in card["inputs"].items()}
    np.savez(file, **raw_inputs(Medical(config).source(config.data.split).read_batch(np.arange(1)), wanted))


def measure(ways: dict[str, Way], inputs: Path, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Cold starts one after the other, then calls in turns."""
    core = max(os.sched_getaffinity(0))
    running, times = {}, {name: list[float]() for name in ways}
    for name, way in ways.items():
        colds = []
        for _ in range(args.starts):
            if name in running:
                running[name].close()
            running[name] = Running(way, inputs, core)
            colds.append(running[name].cold_start_s)
        times[name].append(min(colds))
    for _ in range(args.rounds):
        for name, process in running.items():
            times[name] += process.predict(args.calls)
    return {name: _row(times[name], ways[name], process.close()) for name, process in running.items()}


def _row(times: Sequence[float], way: Way, took: dict[str, int]) -> dict[str, Any]:
    cold, *calls = times
    row = {
        "cold_start_s": cold,
        "ms": {"median": float(np.median(calls)), "best": min(calls), "p99": float(np.quantile(calls, 0.99))},
        **took,
    }
    if way.kind == "checkpoint":
        return row
    card = json.loads((way.folder / "card.json").read_text())
    findings = card["agreement"]["findings"].values()
    probabilities = [row["largest_difference"] for row in findings if row["kind"] in ("binary", "rating")]
    row["agreement"] = card["agreement"]["decisions"] | {"largest_probability_difference": max(probabilities)}
    row["model_bytes"] = (way.folder / card["file"]).stat().st_size
    return row


def table(report: dict[str, Any]) -> str:
    """What each way takes, in Markdown."""
    lines = [
        "| | ms median | best | cold start, s | peak MB | model MB | runtime MB | same calls | difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in report["ways"].items():
        agreed = row.get("agreement")
        same = f"{agreed['same']} of {agreed['of']}" if agreed else "-"
        apart = f"{agreed['largest_probability_difference']:.1g}" if agreed else "-"
        size = f"{row['model_bytes'] / 1e6:.2f}" if agreed else "-"
        lines.append(
            f"| {name} | {row['ms']['median']:.2f} | {row['ms']['best']:.2f} | {row['cold_start_s']:.2f} | "
            f"{row['peak_bytes'] / 1e6:.0f} | {size} | {row['runtime_bytes'] / 1e6:.0f} | {same} | {apart} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--converter", required=True, type=Path, help="Python with the LiteRT converter")
    parser.add_argument("--device", required=True, type=Path, help="Python with ai-edge-litert")
    parser.add_argument("--compiler", type=Path, help="Python with the IREE compiler")
    parser.add_argument("--iree", type=Path, help="Python with iree-base-runtime")
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("--cases", type=int, default=400, help="cases that the exports are compared on")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=10, help="calls of each way in a round")
    parser.add_argument("--starts", type=int, default=3, help="cold starts, of which the quickest counts")
    args = parser.parse_args(arguments)
    if (args.compiler is None) != (args.iree is None):
        parser.error("--compiler and --iree belong together: give both, or none")
    told = {"cases": args.cases, "rounds": args.rounds, "calls": args.calls, "starts": args.starts}
    about = jax_environment(argparse.Namespace(**told, overrides=[]))
    with tempfile.TemporaryDirectory() as place:
        ways = export_all(args, Path(place))
        card = json.loads((Path(place) / "fp32" / "card.json").read_text())
        compiled = Path(place) / "iree" / "card.json"
        versions = card["versions"] | (json.loads(compiled.read_text())["versions"] if compiled.exists() else {})
        one_case(args, card, Path(place) / "case.npz")
        rows = measure(ways, Path(place) / "case.npz", args)
    config = find_checkpoint(args.checkpoint).config()
    report = about | {"checkpoint": config.name, "versions": about["versions"] | versions, "ways": rows}
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main(sys.argv[1:])
