"""Speed of reading shuffled cases: r1jax beside grain's default form, torch, HF datasets and WebDataset.

    python benchmarks/data.py --output benchmarks/results/data.json     # about twenty minutes
    python benchmarks/data.py --scale 0.05 --repeats 1 --seconds 0.1 --training 0 --output data.json   # a quick try

All read the same generated cases (a picture, nine record fields, a text) in shuffled batches of 32, in turn, several
times, so that what else runs on the machine meets all of them. `first` is the first pass over the cases, with nothing
in memory but the system's page cache; it ends early after four times `--seconds`. `later` is what follows, for
`--seconds`. The first batch of each is compared with the cases. Peers read from the local disk; what is not there is
named with a reason. The last part trains configs/medical.py for `--training` steps and reads `data_wait` from its
metrics: of every step, since the loop runs ahead of the device between two steps that are logged.
"""

import argparse
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import data_readers as readers  # noqa: E402
from benchmarks.children import told_command  # noqa: E402
from benchmarks.data_readers import BATCH, NUMBERS, Batch, Cases, Passes  # noqa: E402
from r1jax.config import CacheConfig  # noqa: E402
from r1jax.data.filesystem import open_filesystem  # noqa: E402
from r1jax.data.parquet import ParquetStore  # noqa: E402
from r1jax.data.synthetic import SyntheticCases  # noqa: E402
from r1jax.serve.data_command import convert  # noqa: E402
from tests.data.services import RedisServer, start_hdfs, start_redis  # noqa: E402

SHAPES = {"image": (48, 48), "volume": (32, 32, 32)}
ROWS = {"image": 8192, "volume": 2048}
GROUP_ROWS = {"image": 64, "volume": 16}
SHARE = 3
"""A third of the pictures fits into the smaller process memory: a few windows."""
SETTLE_S = 2.0
"""Longest wait for the threads of a reader that has been closed."""
FIRST = 4
"""The first pass may take so many times as long, since it fills caches."""
STARTING = 5
"""First steps that are left out: the threads start with the first."""


def make(folder: Path, picture: str, rows: int) -> Cases:
    """Generates cases and writes them in every form."""
    shape = SHAPES[picture]
    source = SyntheticCases(0, rows, "train", shape if len(shape) == 3 else (8, *shape))
    parts = [source.read_batch(np.arange(first, min(first + 64, rows))) for first in range(0, rows, 64)]
    pictures = np.concatenate([part["volume"] for part in parts])
    stored: dict[str, Any] = {"case_id": np.array([word for part in parts for word in part["case_id"]])}
    stored[picture] = pictures if len(shape) == 3 else pictures[:, 4]
    table = np.concatenate([part["table"] for part in parts])
    stored |= {name: table[:, column] for column, name in enumerate(NUMBERS)}
    stored["text"] = np.array([word for part in parts for word in part["text"]])
    stored |= {f"target.{name}": np.concatenate([part[f"target.{name}"] for part in parts]) for name in ("malignancy",)}
    (folder / "cases").mkdir(parents=True)
    np.savez(folder / "cases/cases.npz", **stored)
    convert([str(folder / "cases"), str(folder / "parquet"), "--group-rows", str(GROUP_ROWS[picture])])
    cases = Cases(folder, str(folder / "parquet"), picture, str(pictures.dtype), shape, rows)
    readers.write_peers(cases)
    return cases


def upload(cases: Cases, root: str) -> Cases:
    """Copies the Parquet files to HDFS."""
    url = f"{root}/{cases.picture}"
    filesystem, place = open_filesystem(url)
    local = pyarrow.fs.LocalFileSystem()
    pyarrow.fs.copy_files(
        str(cases.folder / "parquet"), place, source_filesystem=local, destination_filesystem=filesystem
    )
    return Cases(cases.folder, url, cases.picture, cases.dtype, cases.shape, cases.rows)


def variants(cases: Cases, hdfs: Cases | None, redis: RedisServer | None) -> dict[str, Callable[..., Passes]]:
    """Every reader by its name; each takes a stack of what is to be closed and a place for its counters."""
    size = cases.rows * int(np.prod(cases.shape)) * np.dtype(cases.dtype).itemsize
    small = size // SHARE
    caches = {"all fits": CacheConfig(), "a third fits": CacheConfig(capacity=small)}
    if redis is not None:
        caches["a third fits, Redis"] = CacheConfig(url=redis.unix_url, capacity=small)
    found: dict[str, Callable[..., Passes]] = {}
    for place, there in {"local": cases, "HDFS": hdfs}.items():
        if there is None:
            continue
        found[f"grain, one element at a time, {place}"] = partial(readers.open_grain, there)
        for order in ("global", "window"):
            for name, cache in caches.items():
                found[f"r1jax, {order}, {name}, {place}"] = partial(readers.open_ours, there, cache, order, True)
    for order in ("global", "window"):
        name = f"r1jax, {order}, all fits, in the asking thread, local"
        found[name] = partial(readers.open_ours, cases, CacheConfig(), order, False)
    if readers.absent("torch") is None:
        for form, kind in {"Parquet": readers.ParquetRows, ".npz files": readers.NpzRows}.items():
            for workers in (0, 2):
                name = f"torch DataLoader, {form}, {workers} workers"
                found[name] = lambda stack, counted, k=kind, w=workers: readers.open_torch(cases, k, w, stack)
    if readers.absent("datasets") is None:
        found["HF datasets, shuffled indices"] = lambda stack, counted: readers.open_hf(cases, False)
        found["HF datasets, stream, shuffle buffer"] = lambda stack, counted: readers.open_hf(cases, True)
    if readers.absent("webdataset") is None:
        found["WebDataset, tar, shuffle buffer"] = lambda stack, counted: readers.open_webdataset(cases)
    return found


def read(batches: Iterator[Batch], seconds: float) -> tuple[int, float, Batch]:
    """Reads to the end or until the time is up: rows, seconds, the first batch."""
    start, rows, first = time.perf_counter(), 0, None
    for batch in batches:
        rows += len(batch["case_id"])
        first = batch if first is None else first
        if time.perf_counter() - start > seconds:
            break
    spent = time.perf_counter() - start
    if first is None:
        raise SystemExit("a reader gave no batch at all: raise --scale")
    return rows, spent, first


def measure(open_: Callable[..., Passes], check: Callable[[Batch], None], seconds: float) -> dict[str, float]:
    """The first pass of one reader and those after it; it is closed afterwards."""
    threads, counted = threading.active_count(), dict[str, float]()
    with ExitStack() as stack:
        passes = open_(stack, counted)
        figures: dict[str, float] = {}
        total = 0
        later = itertools.chain.from_iterable(passes() for _ in itertools.count())
        for name, batches, limit in (("first", passes(), FIRST * seconds), ("later", later, seconds)):
            rows, spent, batch = read(batches, limit)
            check(batch)
            figures[name] = rows / spent
            total += rows
        del batches, later, passes  # what is left of them is closed, and counted; nothing holds the store any longer
        figures |= {"rows": total}
        if "cold_bytes" in counted:
            figures["decoded_bytes_per_row"] = counted["cold_bytes"] / total
    gc.collect()  # a store's thread ends with the store
    end = time.monotonic() + SETTLE_S
    while threading.active_count() > threads and time.monotonic() < end:
        time.sleep(0.05)  # threads that read ahead finish what they have begun
    return figures


def checker(cases: Cases) -> Callable[[Batch], None]:
    """Compares batches with the cases themselves."""
    with np.load(cases.folder / "cases/cases.npz") as stored:
        table = np.stack([stored[name] for name in NUMBERS], 1)
        values = zip(stored["case_id"].tolist(), stored[cases.picture], table, stored["text"].tolist(), strict=True)
        known = {case: (zlib.crc32(picture.tobytes()), row, text) for case, picture, row, text in values}

    def check(batch: Batch) -> None:
        for case, picture, row, text in zip(*(batch[n] for n in ("case_id", "picture", "table", "text")), strict=True):
            sum_, numbers, words = known[case]
            same = picture.dtype == cases.dtype and picture.shape == cases.shape
            if not same or zlib.crc32(np.ascontiguousarray(picture)) != sum_ or text != words:
                raise SystemExit(f"{case} was read wrong")
            np.testing.assert_array_equal(row, numbers)

    return check


def summary(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def compare(cases: Cases, hdfs: Cases | None, redis: RedisServer | None, args: argparse.Namespace) -> dict[str, Any]:
    """All readers in turn, several times."""
    check = checker(cases)
    known = variants(cases, hdfs, redis)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in known}
    for repeat in range(args.repeats):
        for name, open_ in known.items():
            if redis is not None:
                with _client(redis) as client:
                    client.flushall()
            runs[name].append(measure(open_, check, args.seconds))
            print(f"{cases.picture} {repeat} {name}: {runs[name][-1]}", file=sys.stderr)
    found = {}
    for name, figures in runs.items():
        found[name] = {what: summary([run[what] for run in figures]) for what in figures[0]}
        local = f"grain, one element at a time, {'HDFS' if name.endswith('HDFS') else 'local'}"
        ratios = [run["later"] / base["later"] for run, base in zip(figures, runs[local], strict=True)]
        found[name]["times_grain"] = summary(ratios)
    store = ParquetStore.open(cases.url)
    return {
        "rows": cases.rows,
        "bytes_of_a_picture": int(np.prod(cases.shape)) * np.dtype(cases.dtype).itemsize,
        "bytes_of_parquet": sum(part.size for part in store.parts),
        "row_groups": len(store.groups),
        "readers": found,
    }


def _client(redis: RedisServer) -> Any:
    from redis import Redis

    return Redis(unix_socket_path=str(redis.socket))


def starvation(folder: Path, steps: int, cases: int) -> dict[str, Any]:
    """Share of the time that train.py waits for data, for configs/medical.py.

    Every step is logged, so that the loop waits for the end of each: what it then waits for data, the device waits too.
    """
    source = SyntheticCases(0, cases, "train")
    raw = source.read_batch(np.arange(cases))
    arrays = {name: np.asarray(raw[name]) for name in ("case_id", "volume", "volume_spacing", "text")}
    arrays |= {name: raw["table"][:, column] for column, name in enumerate(NUMBERS)}
    arrays |= {name: values for name, values in raw.items() if name.startswith("target.")}
    arrays["split"] = np.where(np.arange(cases) % 16 == 0, "val", "train")
    (folder / "training").mkdir()
    np.savez(folder / "training/cases.npz", **arrays)
    convert([str(folder / "training"), str(folder / "training-parquet")])
    asked = {
        "generated cases": [],  # as many as the config says: each is drawn anew
        "Parquet, window": ["--data.path", str(folder / "training-parquet"), "--data.order", "window"],
    }
    found = {}
    for name, words in asked.items():
        workdir = folder / name.replace(", ", "-").replace(" ", "-")
        command = [sys.executable, "train.py", "--config", "configs/medical.py", "--workdir", str(workdir), *words]
        command += ["--train.steps", str(steps), "--train.warmup_steps", "5", "--data.val_cases", "64"]
        command += ["--train.eval_every", str(steps), "--train.log_every", "1"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text("utf-8").splitlines()]
        rows = [row for row in logged if "data_wait" in row][STARTING:]
        seconds = [1 / row["examples_per_second"] for row in rows]  # an example
        waited = sum(row["data_wait"] * each for row, each in zip(rows, seconds, strict=True)) / sum(seconds)
        found[name] = {what: summary([row[what] for row in rows]) for what in ("data_wait", "examples_per_second")}
        found[name] |= {"waited": waited, "steps": len(rows)}
    return {"steps": steps, "cases": cases, "runs": found}


def table(report: dict) -> str:
    """Markdown."""
    lines = []
    for picture, part in report["sets"].items():
        size = part["bytes_of_a_picture"] / 1024
        heads = [f"{picture} of {size:.1f} KiB, {part['rows']:,} rows", "examples/s", "first pass", "x grain"]
        lines += [f"| {' | '.join([*heads, 'decoded, x a row'])} |", "|---|---|---|---|---|"]
        for name, figures in sorted(part["readers"].items(), key=lambda item: -item[1]["later"]["median"]):
            later, ratio, cold = figures["later"], figures["times_grain"], figures.get("decoded_bytes_per_row")
            told = f"{later['median']:,.0f} ({later['lowest']:,.0f} to {later['highest']:,.0f})"
            read = f"{cold['median'] / part['bytes_of_a_picture']:.1f}" if cold else ""
            lines.append(f"| {name} | {told} | {figures['first']['median']:,.0f} | {ratio['median']:.1f} | {read} |")
        lines.append("")
    for name, figures in report["training"].get("runs", {}).items():
        lines.append(
            f"- Training configs/medical.py, {name}: waits for data {figures['waited']:.2%} of the time of"
            f" {figures['steps']} steps; median of a step {figures['data_wait']['median']:.2%}."
        )
    lines += [f"- Absent: {what}: {why}." for what, why in report["absent"].items()]
    return "\n".join(lines)


def server(start: Callable[..., Any], folder: Path, stack: ExitStack, name: str, absent: dict[str, str]) -> Any:
    """Starts a server of the tests; None and a reason where there is none."""
    folder.mkdir()
    try:
        return stack.enter_context(start(folder))
    except pytest.skip.Exception as skipped:
        absent[name] = str(skipped)
        return None


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything, in a folder for temporary files."""
    absent = {name: why for name in ("torch", "datasets", "webdataset") if (why := readers.absent(name))}
    sets = {}
    with ExitStack() as stack:
        redis = server(start_redis, folder / "redis", stack, "Redis", absent)
        node = server(start_hdfs, folder / "hdfs", stack, "HDFS", absent)
        for picture in args.pictures:
            cases = make(folder / picture, picture, max(int(ROWS[picture] * args.scale), 2 * BATCH))
            sets[picture] = compare(cases, upload(cases, node.url) if node else None, redis, args)
    training = starvation(folder, args.training, args.training_cases) if args.training else {}
    return {"sets": sets, "training": training, "absent": absent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement after the first pass")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of rows")
    parser.add_argument("--pictures", nargs="+", choices=ROWS, default=list(ROWS), help="of the cases")
    parser.add_argument("--training", type=int, default=60, help="steps of train.py; 0 leaves it out")
    parser.add_argument("--training-cases", type=int, default=512)
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="r1jax-data-") as folder:
        found = run(args, Path(folder))
    names = ("numpy", "pyarrow", "grain", "jax", "torch", "datasets", "webdataset", "redis", "hdfs-native")
    versions = {name: _version(name) for name in names}
    report = {
        "command": told_command(),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), **versions},
        "arguments": {name: value for name, value in vars(args).items() if name != "output"},
        "seconds": time.monotonic() - start,
        **found,
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(table(report))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
