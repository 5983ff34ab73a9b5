"""A medical checkpoint on one CPU core: LiteRT and IREE beside jitted JAX, in one run, the ways taking turns.

    python benchmarks/edge.py --checkpoint runs/medical --converter PYTHON --device PYTHON \\
        --output benchmarks/results/edge.json

--converter has the LiteRT converter (docs/export.md), --device has ai-edge-litert and nothing of r1jax; --compiler has
the IREE compiler, --iree has iree-base-runtime, and without these two IREE is left out. Jitted JAX is compiled for the
CPU that it runs on, IREE for the usual one and for each of --target-cpus. --codes are checkpoints that
`r1jax quantize` has made of this one: their files are held to this one too, not to themselves. A way whose export is
refused, as that of int8 weights may be, is left out, and the command says so.
"""

import argparse
import functools
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
from r1jax.serve.export_command import TOOLS, ExportArguments, export, open_checkpoint  # noqa: E402
from r1jax.serve.export_device import run_model  # noqa: E402
from r1jax.serve.export_gate import INT8, compare  # noqa: E402
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
JITTED = "checkpoint, jitted JAX fp32"
"""The way that all others are compared with."""


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
    devices = {"litert": (args.converter, args.device), "iree": (args.compiler, args.iree)}
    litert, iree = (["--to", name, "--converter", str(converter)] for name, (converter, _) in devices.items())
    for name, more in (("fp32", litert), ("fp16", [*litert, "--weights", "fp16"]), ("jax", [])):
        _export(args.checkpoint, place / name, args.cases, more)
    may_fail = [(args.checkpoint, "int8", [*litert, "--weights", "int8"])]
    if args.compiler:
        may_fail.append((args.checkpoint, "iree", iree))
        may_fail += [(args.checkpoint, f"iree-{cpu}", [*iree, "--target-cpu", cpu]) for cpu in args.target_cpus]
    ways = {
        JITTED: Way("checkpoint", sys.executable, args.checkpoint.absolute()),
        "exported, JAX": Way("exported", sys.executable, place / "jax"),
        "exported, LiteRT fp32": Way("litert", str(args.device), place / "fp32"),
        "exported, LiteRT fp16": Way("litert", str(args.device), place / "fp16"),
        "exported, LiteRT int8": Way("litert", str(args.device), place / "int8"),
        "exported, IREE fp32": Way("iree", str(args.iree), place / "iree"),
    }
    for cpu in args.target_cpus:
        ways[f"exported, IREE fp32 for {cpu}"] = Way("iree", str(args.iree), place / f"iree-{cpu}")
    for codes in args.codes:
        for to, name, more in (("litert", "LiteRT", litert), ("iree", "IREE", iree)):
            if devices[to][0]:
                folder = place / f"{codes.name}-{to}"
                may_fail.append((codes, folder.name, more))
                ways[f"codes of {codes.name}, {name}"] = Way(to, str(devices[to][1]), folder)
    for checkpoint, name, more in may_fail:
        try:
            _export(checkpoint, place / name, args.cases, more)
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    return {name: way for name, way in ways.items() if way.folder.exists()}


def _export(checkpoint: Path, folder: Path, cases: int, more: Sequence[str]) -> None:
    export(["--checkpoint", str(checkpoint), "--cases", str(cases), "--output", str(folder), *more])


def agreements(ways: dict[str, Way], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """How far each exported model agrees with the checkpoint.

    Args:
      ways: From `export_all`.
      args: The command line.

    Returns:
      By the name of the way: as its card has it, but of codes, whose card has the agreement with their own checkpoint,
      compared anew on the same cases.
    """
    found = {name: _card(way)["agreement"] for name, way in ways.items() if name != JITTED}
    codes = [name for name in ways if name.startswith("codes of ")]
    if codes:
        asked = ExportArguments(checkpoint=str(args.checkpoint), output="", cases=args.cases)
        said = open_checkpoint(find_checkpoint(args.checkpoint), asked).exported
    for name in codes:
        way = ways[name]
        converter = args.converter if way.kind == "litert" else args.compiler
        run = functools.partial(run_model, way.folder, tool=TOOLS[way.kind], converter=converter)
        found[name] = compare(run, said, INT8)
    return found


def _card(way: Way) -> dict[str, Any]:
    return json.loads((way.folder / "card.json").read_text())


def one_case(args: argparse.Namespace, card: dict[str, Any], file: Path) -> None:
    """Writes the inputs of one generated case."""
    config = find_checkpoint(args.checkpoint).config()
    wanted = {name: Port(**port | {"shape": tuple(port["shape"])}) for name, port in card["inputs"].items()}
    np.savez(file, **raw_inputs(Medical(config).source(config.data.split).read_batch(np.arange(1)), wanted))


class Taken(NamedTuple):
    """What a way took."""

    cold_starts: list[float]
    """Seconds."""
    calls: list[float]
    """Milliseconds of each."""
    resources: dict[str, int]
    """Of its process."""


def measure(ways: dict[str, Way], inputs: Path, args: argparse.Namespace) -> dict[str, Taken]:
    """Cold starts in turns, then calls in turns, so that what else runs on the machine meets all ways alike."""
    core = max(os.sched_getaffinity(0))
    running: dict[str, Running] = {}
    colds, calls = ({name: list[float]() for name in ways} for _ in range(2))
    for _ in range(args.starts):
        for name, way in ways.items():
            if name in running:
                running[name].close()
            running[name] = Running(way, inputs, core)
            colds[name].append(running[name].cold_start_s)
    for _ in range(args.rounds):
        for name, process in running.items():
            calls[name] += process.predict(args.calls)
    return {name: Taken(colds[name], calls[name], process.close()) for name, process in running.items()}


def row_of(taken: Taken) -> dict[str, Any]:
    """Figures of a way."""
    calls = taken.calls
    return {
        "cold_start_s": min(taken.cold_starts),
        "ms": {"median": float(np.median(calls)), "best": min(calls), "p99": float(np.quantile(calls, 0.99))},
        **taken.resources,
    }


def model_of(way: Way, agreement: dict[str, Any]) -> dict[str, Any]:
    """Size of an exported model, and how far it agrees with the checkpoint."""
    findings = agreement["findings"].values()
    probabilities = [row["largest_difference"] for row in findings if row["kind"] in ("binary", "rating")]
    return {
        "agreement": agreement["decisions"] | {"largest_probability_difference": max(probabilities)},
        "model_bytes": (way.folder / _card(way)["file"]).stat().st_size,
    }


def table(report: dict[str, Any]) -> str:
    """What each way takes, in Markdown."""
    lines = [
        "| | ms median | best | x jitted | cold start, s | peak MB | model MB | runtime MB | same calls | difference |",
        "|---" * 10 + "|",
    ]
    jitted = report["ways"][JITTED]["ms"]["best"]
    for name, row in report["ways"].items():
        agreed = row.get("agreement")
        same = f"{agreed['same']} of {agreed['of']}" if agreed else "-"
        apart = f"{agreed['largest_probability_difference']:.1g}" if agreed else "-"
        size = f"{row['model_bytes'] / 1e6:.2f}" if agreed else "-"
        median, best = row["ms"]["median"], row["ms"]["best"]
        lines.append(
            f"| {name} | {median:.2f} | {best:.2f} | {best / jitted:.2f} | "
            f"{row['cold_start_s']:.2f} | {row['peak_bytes'] / 1e6:.0f} | {size} | {row['runtime_bytes'] / 1e6:.0f} | "
            f"{same} | {apart} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--converter", required=True, type=Path, help="Python with the LiteRT converter")
    parser.add_argument("--device", required=True, type=Path, help="Python with ai-edge-litert")
    parser.add_argument("--compiler", type=Path, help="Python with the IREE compiler")
    parser.add_argument("--iree", type=Path, help="Python with iree-base-runtime")
    parser.add_argument("--target-cpus", nargs="+", default=[], help="CPUs that IREE compiles for beside the usual one")
    parser.add_argument(
        "--codes", type=Path, nargs="+", default=[], help="checkpoints of r1jax quantize, of folders of other names"
    )
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("--cases", type=int, default=400, help="cases that the exports are compared on")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=10, help="calls of each way in a round")
    parser.add_argument("--starts", type=int, default=3, help="cold starts, of which the quickest counts")
    args = parser.parse_args(arguments)
    if (args.compiler is None) != (args.iree is None):
        parser.error("--compiler and --iree belong together: give both, or none")
    if args.target_cpus and args.compiler is None:
        parser.error("--target-cpus are of IREE: give --compiler and --iree, or leave them out")
    if len({codes.name for codes in args.codes}) < len(args.codes):
        parser.error("--codes are told apart by the names of their folders, of which two are the same: rename one")
    told = {"cases": args.cases, "rounds": args.rounds, "calls": args.calls, "starts": args.starts}
    about = jax_environment(argparse.Namespace(**told, overrides=[]))
    with tempfile.TemporaryDirectory() as place:
        ways = export_all(args, Path(place))
        cards = [_card(way) for name, way in ways.items() if name != JITTED]
        versions = {name: version for card in cards for name, version in card["versions"].items()}
        agreed = agreements(ways, args)
        one_case(args, cards[0], Path(place) / "case.npz")
        taken = measure(ways, Path(place) / "case.npz", args)
        rows = {name: row_of(taken[name]) for name in ways}
        for name, agreement in agreed.items():
            rows[name] |= model_of(ways[name], agreement)
    config = find_checkpoint(args.checkpoint).config()
    report = about | {"checkpoint": config.name, "versions": about["versions"] | versions, "ways": rows}
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main(sys.argv[1:])
