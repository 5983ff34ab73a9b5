"""Time from a payment that comes in to its score, on one CPU core: r1jax beside LightGBM, with and without reasons.

    python benchmarks/latency.py --checkpoint runs/finance --converter PYTHON --device PYTHON \\
        --output benchmarks/results/latency.json

Every way has a process of its own on the same core, with one thread, and keeps the same history of customers and
terminals up to date; the ways take turns, on the same payments. LightGBM's reasons are its own exact SHAP values
(`pred_contrib`), ours integrated gradients that are checked to add up. The exported model is one more way where both
are named: --converter has the LiteRT converter (docs/export.md), --device has ai-edge-litert, pyarrow, jaxtyping, no
JAX. With `--platform cuda` no peer is measured, only payments a second of the model by the size of a batch.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import jax_environment  # noqa: E402
from benchmarks.edge import Running, Way  # noqa: E402
from benchmarks.fraud import BOOSTING, TREES  # noqa: E402
from benchmarks.latency_child import WAYS  # noqa: E402
from r1jax.data.transaction_cases import TransactionCases  # noqa: E402
from r1jax.data.transaction_state import KeptHistory  # noqa: E402
from r1jax.data.transactions import DAY, Names, Transactions  # noqa: E402
from r1jax.parallel.platform import start_platform  # noqa: E402
from r1jax.serve.export_command import export  # noqa: E402
from r1jax.serve.scorer import Scorer  # noqa: E402
from r1jax.tasks.finance.task import Finance  # noqa: E402
from r1jax.train.checkpoints import find_checkpoint  # noqa: E402

CHILD = Path(__file__).with_name("latency_child.py")
TITLES = {
    "history": "history alone",
    "model": "r1jax",
    "litert": "r1jax, exported to LiteRT",
    "model_reasons": "r1jax, reasons of each",
    "boosted": "LightGBM",
    "boosted_reasons": "LightGBM, SHAP of each",
}
WARM_DAYS = 45
"""Of history, as far as any window reaches back; habits and streams may reach further."""


def part(table: Transactions, rows: slice) -> Transactions:
    """Some payments that follow each other, as a table."""
    columns = ("seconds", "customer", "terminal", "amount", "fraud")
    cut = {name: getattr(table, name)[rows] for name in columns}
    text = None if table.text is None else table.text[rows]
    return Transactions(
        table.ids[rows], **cut, scenario=None, text=text, customers=table.customers, terminals=table.terminals
    )


def write_rows(table: Transactions, file: Path) -> None:
    """Writes payments as `r1jax score` reads them."""
    whose = table.customers.take(pa.array(table.customer)), table.terminals.take(pa.array(table.terminal))
    columns = [table.ids, table.seconds.tolist(), *whose, table.amount.tolist()]
    names = list(Names()[:5])
    if table.text is not None:
        columns, names = [*columns, table.text], [*names, Names().text]
    rows = pa.table(columns, names=names).to_pylist()
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def prepare(args: argparse.Namespace, cases: TransactionCases, count: int, folder: Path) -> None:
    """Leaves what the processes need: a warm history for each, the payments, the exported model, the peer's trees."""
    if args.converter:
        edge = ["--to", "litert", "--converter", str(args.converter), "--output", str(folder / "exported")]
        export([str(args.checkpoint), *edge])
    table, first = cases.table, int(cases.rows[0])
    begin = int(np.searchsorted(table.seconds, table.seconds[first] - WARM_DAYS * DAY))
    scorer = Scorer(find_checkpoint(args.checkpoint))
    about = {"delay": scorer.live.delay, "events": scorer.live.events}
    (folder / "history.json").write_text(json.dumps(about))
    kept = KeptHistory(folder / "state", **about)
    kept.live = scorer.live
    scorer.read_history(part(table, slice(begin, first)))
    kept.extra = scorer.start
    kept.save()
    kept.close()
    for kind in WAYS:
        shutil.copy(folder / "state", folder / f"{kind}.state")
    write_rows(part(table, slice(first, first + count)), folder / "rows.jsonl")
    train = scorer.task.source("train")
    grow_trees(train).save_model(folder / "booster.txt")


def grow_trees(train: TransactionCases):
    """The peer of benchmarks/fraud.py, on the features that the model's table has."""
    import lightgbm

    features, label = train.history.features[train.rows], train.table.fraud[train.rows]
    return lightgbm.train(BOOSTING | {"num_threads": 1}, lightgbm.Dataset(features, label), TREES)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Calls of every way, in turns."""
    core = max(os.sched_getaffinity(0))
    pythons = dict.fromkeys(WAYS, sys.executable) | {"litert": str(args.device)}
    if not args.device:
        del pythons["litert"]
    ways = {kind: Way(kind, python, folder) for kind, python in pythons.items()}
    running = {kind: Running(way, args.checkpoint.absolute(), core, CHILD) for kind, way in ways.items()}
    times: dict[str, list[float]] = {kind: [] for kind in ways}
    for _ in range(args.rounds):
        for kind, process in running.items():
            times[kind] += process.predict(args.explained if kind == "model_reasons" else args.calls)
    found = {}
    for kind, process in running.items():
        ms = np.array(times[kind])
        p50, p99 = np.quantile(ms, [0.5, 0.99])
        figures = {"p50": p50, "p99": p99, "best": ms.min(), "mean": ms.mean()}
        found[TITLES[kind]] = {
            "ms": {name: float(x) for name, x in figures.items()},
            "per_second": float(1e3 / ms.mean()),
            "cold_start_s": process.cold_start_s,
            "peak_bytes": process.close()["peak_bytes"],
        }
    return found


def throughput(checkpoint: Path, cases: TransactionCases, sizes: list[int], seconds: float) -> dict[str, float]:
    """Payments a second of the model alone, by the size of a batch; batches lie in the host's memory."""
    scorer, found = Scorer(find_checkpoint(checkpoint)), {}
    for size in sizes:
        batch = scorer.task.collate(cases.read_batch(np.arange(size) % len(cases)))
        jax.block_until_ready(scorer.forward(batch))
        calls, began = 0, time.perf_counter()
        while calls < 3 or time.perf_counter() - began < seconds:
            np.asarray(scorer.forward(batch))
            calls += 1
        found[str(size)] = calls * size / (time.perf_counter() - began)
    return found


def table(report: dict[str, Any]) -> str:
    """Both tables in Markdown."""
    lines = []
    if report["ways"]:
        lines += ["| a payment, ms | p50 | p99 | best | payments/s | peak MB |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {name} | {row['ms']['p50']:.3f} | {row['ms']['p99']:.3f} | {row['ms']['best']:.3f} | "
            f"{row['per_second']:,.0f} | {row['peak_bytes'] / 1e6:.0f} |"
            for name, row in report["ways"].items()
        ]
        lines.append("")
    sizes = report["throughput"]
    lines += [f"| batch of the model alone | {' | '.join(sizes)} |", "|---" * (1 + len(sizes)) + "|"]
    return "\n".join([*lines, f"| payments/s | {' | '.join(f'{rate:,.0f}' for rate in sizes.values())} |"])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--converter", type=Path, help="Python with the LiteRT converter; none leaves LiteRT out")
    parser.add_argument("--device", type=Path, help="Python with ai-edge-litert, pyarrow and jaxtyping")
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("--platform", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=50, help="payments of each way in a round")
    parser.add_argument("--explained", type=int, default=5, help="calls of r1jax with reasons in a round")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 16, 256, 4096], help="batches of the throughput")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each batch size")
    args = parser.parse_args(arguments)
    if (args.converter is None) != (args.device is None):
        parser.error("--converter and --device go together: one exports the model, the other runs it")
    start_platform(args.platform)
    checkpoint = find_checkpoint(args.checkpoint)
    task = Finance(checkpoint.config())
    cases, ways = task.source("test"), {}
    names = ("rounds", "calls", "explained", "sizes", "platform")
    told = {name: getattr(args, name) for name in names}
    about = jax_environment(argparse.Namespace(**told, overrides=[]))
    with tempfile.TemporaryDirectory() as place:
        if args.platform == "cpu":
            count = 1 + args.rounds * args.calls
            prepare(args, cases, count, Path(place))
            ways = measure(args, Path(place))
            about["versions"]["lightgbm"] = importlib.metadata.version("lightgbm")
    rates = throughput(args.checkpoint, cases, args.sizes, args.seconds)
    model = {"name": checkpoint.config().name, "events": task.config.task.finance.events}
    report = about | {"checkpoint": model, "ways": ways, "throughput": rates}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main(sys.argv[1:])
