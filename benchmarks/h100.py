"""Kernels of r1jax on one GPU, beside their peers and the ceilings of the same card in the same run.

    python benchmarks/h100.py --output benchmarks/results/h100.json
    python benchmarks/h100.py --scale tiny --output /tmp/h100.json --cases attention grouped-weight

Every case is checked against an fp32 reference, then timed: medians of samples of 10 ms or more. Cases run in child
processes; what crashes one (a kernel may take its CUDA context with it) is noted, and a new child goes on with the
rest. Rates count useful operations only: causal attention half of the scores, routed rows without their groups'
padding, a backward pass of attention five products. Results are written after each case.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.children import follow, told_command  # noqa: E402

LIMIT, LIMIT_TRAIN = 60.0, 300.0
"""Seconds without a word after which a child is given up."""
PEAK = 989.4
"""bf16 TFLOP/s in the datasheet of the H100 SXM."""
GOALS = {
    "attention-forward cuDNN causal": (500, 650),
    "attention-backward cuDNN causal": (380, 500),
    "grouped-forward ours": (480, 600),
    "grouped-input ours": (400, 550),
    "grouped-weight ours": (450, 650),
}
"""TFLOP/s that a case must and should reach."""
PEERS = ("torch", "transformers", "transformers autocast")
"""Libraries whose training steps are measured where they are installed."""
GOALS_MS = {"loss": (110, 92)}
"""The same in milliseconds, of all cases of ours whose names begin so."""
GOALS_STEP = {
    "train V2-Lite-4L, ours": "100,000 and 140,000 tokens/s",
    "train dense 1B, ours": "52% and 62% of the datasheet",
}
"""The same of training steps, in words."""


def child(args: argparse.Namespace) -> None:
    """Measures cases and prints a line of JSON before and after each."""
    if args.child == "torch":
        from benchmarks.h100_torch import measure
    elif args.child == "train":
        from benchmarks import h100_train

        measure = functools.partial(h100_train.measure, folder=args.output and args.output.parent)
    elif args.child == "compile":
        from benchmarks import h100_train

        measure = lambda name, scale, samples: h100_train.compile_only(name, scale)  # noqa: E731
    elif args.child == "start":
        from benchmarks import h100_train

        measure = lambda name, scale, samples: h100_train.write_start(name, scale, args.starts)  # noqa: E731
    elif args.child == "torch-train":
        from benchmarks import h100_train_torch

        measure = functools.partial(h100_train_torch.measure, folder=args.starts)
    else:
        from benchmarks.h100_kernels import measure
    for name in args.names:
        print(json.dumps({"begin": name}), flush=True)
        try:
            row = measure(name, args.scale, args.samples)
        except Exception as error:  # whatever a kernel refuses is a result
            text = " ".join(str(error).split())
            row = {"name": name, "refused": f"{type(error).__name__}: {text[:300]}"}
        print(json.dumps(row), flush=True)


def start_child(kind: str, names: list[str], args: argparse.Namespace, **pipes: Any) -> subprocess.Popen:
    """Starts the process that measures cases."""
    command = [sys.executable, __file__, "--child", kind, "--scale", args.scale, "--samples", str(args.samples)]
    command += ["--starts", str(args.starts), *(["--output", str(args.output)] if args.output else [])]
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93"}
    if kind in ("compile", "start"):
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    return subprocess.Popen([*command, "--names", *names], env=environment, **pipes)


def compile_ahead(names: list[str], args: argparse.Namespace) -> None:
    """Compiles training steps side by side, so that the cases that are timed find them in the cache."""
    children = [start_child("compile", [name], args) for name in names]
    for process in children:
        try:
            process.wait(max(0.0, args.end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def run_child(kind: str, names: list[str], args: argparse.Namespace, note) -> list[str]:
    """Runs cases in a child and notes their rows.

    Returns:
      The cases that are left to do after the one that ended it.
    """
    process = start_child(kind, names, args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return follow(process, names, LIMIT_TRAIN if "train" in kind else LIMIT, args.end, note)


def environment() -> dict:
    """The command, versions and the card."""
    versions = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "torch", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        card = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        card = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    return {"command": told_command(), "hardware": card, "versions": versions}


def table(rows: list[dict]) -> str:
    """One line a case; a share is of the largest matmul of the same run."""
    ceiling = next((row["tflops"] for row in rows if row["name"] == "ceiling matmul" and "tflops" in row), None)
    lines = [f"{'case':62}{'ms':>9}{'TFLOP/s':>9}{'of peak':>9}{'of matmul':>10}{'error':>10}"]
    for row in rows:
        if "refused" in row:
            lines.append(f"{row['name']:62} {row['refused'][:120]}")
            continue
        rate = f"{row['tflops']:9.1f}{row['tflops'] / PEAK:9.1%}" if "tflops" in row else f"{'':18}"
        share = f"{row['tflops'] / ceiling:10.1%}" if ceiling and "tflops" in row else f"{'':10}"
        error = f"{row['error']:10.1e}" if row["error"] is not None else f"{'':10}"
        more = f"  {row['tb_per_s']:.2f} TB/s" if "tb_per_s" in row else ""
        more += f"  {row['extra_gib']:.2f} GiB extra" if "extra_gib" in row else ""
        if "tokens_per_second" in row:
            more += f"  {row['tokens_per_second']:,.0f} tokens/s, {row['peak_gib']:.1f} GiB"
            more += f", loss {row['losses'][0]:.3f} to {row['losses'][-1]:.3f}"
            apart = losses_apart(row, rows)
            more += f", at most {apart:.2%} from ours" if apart is not None else ""
        lines.append(f"{row['name']:62}{row['ms']:9.3f}{rate}{share}{error}{more}")
    return "\n".join(lines)


def with_backward(rows: list[dict]) -> list[dict]:
    """Adds the backward pass of attention alone: what forward and backward take together, less the forward pass."""
    found = []
    for row in rows:
        found.append(row)
        forward = [r for r in rows if r["name"] == row["name"].replace("-both", "-forward") and same_run(r, row)]
        if not row["name"].startswith("attention-both") or not forward or "refused" in row or "refused" in forward[0]:
            continue
        ms, flops = row["ms"] - forward[0]["ms"], row["ms"] * row["tflops"] - forward[0]["ms"] * forward[0]["tflops"]
        name = row["name"].replace("-both", "-backward")
        found.append({"name": name, "ms": ms, "tflops": flops / ms, "error": None, "run": row.get("run", 1)})
    return found


def losses_apart(row: dict, rows: list[dict]) -> float | None:
    """Largest relative distance of a peer's first 20 losses, or as many as both have, from ours, of its run if any."""
    model = row["name"].split(",")[0]
    ours = [r for r in rows if r["name"] == f"{model}, ours" and "losses" in r]
    ours.sort(key=lambda r: not same_run(r, row))
    if not ours or row["name"].endswith(", ours"):
        return None
    return max(abs(a / b - 1) for a, b in zip(row["losses"][:20], ours[0]["losses"][:20], strict=False))


def same_run(a: dict, b: dict) -> bool:
    """Files may hold rows of several runs, numbered from 1."""
    return a.get("run", 1) == b.get("run", 1)


def markdown(report: dict) -> str:
    """The table of benchmarks/README.md."""
    rows = [row for row in report["results"] if "refused" not in row]
    lines = [
        "| case | run | ms | TFLOP/s | of the datasheet | of the run's matmul | error | must, aim |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in with_backward(rows):
        rate = ["", "", ""]
        if "tflops" in row:
            ceiling = next((r["tflops"] for r in rows if r["name"] == "ceiling matmul" and same_run(r, row)), None)
            share = f"{row['tflops'] / ceiling:.0%}" if ceiling else ""
            rate = [f"{row['tflops']:.0f}", f"{row['tflops'] / PEAK:.0%}", share]
        elif "tb_per_s" in row:
            rate[0] = f"{row['tb_per_s']:.2f} TB/s"
        goal = "{} and {} TFLOP/s".format(*GOALS[row["name"]]) if row["name"] in GOALS else ""
        for name, goals in GOALS_MS.items():
            own = row["name"].startswith(name) and "products" not in row["name"]
            goal = "{} and {} ms".format(*goals) if own else goal
        goal = GOALS_STEP.get(row["name"], goal)
        spread = f" ± {row['iqr_ms'] / 2:.3f}" if "iqr_ms" in row else ""
        more = f", {row['extra_gib']:.2f} GiB extra" if "extra_gib" in row else ""
        if "tokens_per_second" in row:
            more += f", {row['tokens_per_second']:,.0f} tokens/s, {row['peak_gib']:.0f} GiB"
            apart = losses_apart(row, rows)
            more += "" if apart is None else f", losses within {apart:.1%} of ours"
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        cells = [row["name"] + more, str(row.get("run", 1)), f"{row['ms']:.3f}{spread}", *rate, error, goal]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *(["", report["note"]] if "note" in report else [])])


def risky(name: str) -> bool:
    """Whether a case runs kernels that may end their process, and not only a library's."""
    return name.startswith(("grouped", "tiling", "experts"))


def chosen(names: list[str], words: list[str]) -> list[str]:
    """Cases whose name starts with one of the words."""
    return [name for name in names if not words or any(name.startswith(word) for word in words)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full")
    parser.add_argument("--cases", nargs="+", default=[], help="only those whose names begin with one of these words")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--limit", type=float, default=600, help="seconds after which it ends")
    parser.add_argument("--ahead", action="store_true", help="compile all training steps first, side by side")
    parser.add_argument("--starts", type=Path, help=argparse.SUPPRESS)
    kinds = ("jax", "torch", "train", "start", "torch-train", "compile")
    parser.add_argument("--child", choices=kinds, help=argparse.SUPPRESS)
    parser.add_argument("--names", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.child:
        child(args)
        return
    with tempfile.TemporaryDirectory() as scratch:
        args.starts = Path(scratch)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{scratch}/compiled")
        measure_all(args)


def measure_all(args: argparse.Namespace) -> None:
    """Runs the chosen cases, each kind in children of its own, and prints the table."""
    began = time.monotonic()
    rows: list[dict] = []
    result = environment() | {"results": rows}

    def note(row: dict) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.output:
            result["seconds"] = time.monotonic() - began
            args.output.write_text(json.dumps(result, indent=1) + "\n")

    from benchmarks import h100_kernels, h100_torch, h100_train

    own = list(h100_kernels.cases())
    peers = list(h100_torch.CASES) if importlib.util.find_spec("torch") else []
    last = [name for name in own if name.startswith("tiling")]
    args.end = began + args.limit
    steps = list(h100_train.cases(args.scale))
    first = [name for name in own if name not in last]
    models = [h100_train.model_of(name) for name in steps if name.endswith(", ours")]
    rivals = [
        f"train {model}, {peer}" for model in models for peer in PEERS if importlib.util.find_spec(peer.split()[0])
    ]
    if args.ahead:
        compile_ahead(chosen(steps, args.cases), args)
    groups = (("jax", first), ("train", steps), ("torch-train", rivals), ("torch", peers), ("jax", last))
    for kind, names in groups:
        left = chosen(names, args.cases)
        if kind == "torch-train" and left:
            start_child("start", list(dict.fromkeys(map(h100_train.model_of, left))), args).wait()
        while left and time.monotonic() < args.end:
            alone = "train" in kind  # a training step wants the whole memory
            together = left[:1] if alone else [name for name in left if risky(name) == risky(left[0])]
            later = [name for name in left if name not in together]
            left = run_child(kind, together, args, note) + later
    print(table(rows))
    print(f"{time.monotonic() - began:.0f} s; {result['hardware']}; {result['versions']}")


if __name__ == "__main__":
    main()
