"""Readers that benchmarks/data.py compares: r1jax, grain's default form, torch, HF datasets and WebDataset.

Each reads the same cases - a picture, record fields, a text - in shuffled batches of `BATCH`, and gives the same
arrays. `open_*` returns a function that starts the next pass over the cases.
"""

import importlib.util
import io
import itertools
import json
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSelector

from r1jax.config import CacheConfig, DataConfig
from r1jax.data.filesystem import open_filesystem
from r1jax.data.folder import FolderCases
from r1jax.data.loader import training_batches
from r1jax.data.order import open_order
from r1jax.data.parquet import SUFFIX
from r1jax.tasks.medical.schema import RECORD_FIELDS

BATCH = 32
BUFFER = 256
"""Rows of the peers' shuffle buffers; a window of ours holds as many or fewer of the larger rows."""
SHARD = 256
"""Rows of a tar file."""
NUMBERS = [field.name for field in RECORD_FIELDS]
Batch = dict[str, Any]
Passes = Callable[[], Iterator[Batch]]


@dataclass(frozen=True)
class Cases:
    """The same rows in the forms that the readers want.

    Attributes:
      folder: Holds `parquet`, `npz` and `tar`.
      url: Of the Parquet files; on HDFS too, for those that can.
      picture: Its name, `image` or `volume`.
      dtype: Of the picture.
      shape: Of the picture.
      rows: How many.
    """

    folder: Path
    url: str
    picture: str
    dtype: str
    shape: tuple[int, ...]
    rows: int

    @property
    def columns(self) -> list[str]:
        """What every reader reads."""
        return ["case_id", self.picture, *NUMBERS, "text"]

    @property
    def parquet(self) -> list[str]:
        """Local Parquet files."""
        return [str(path) for path in sorted((self.folder / "parquet").glob("*.parquet"))]


def write_peers(cases: Cases) -> None:
    """Writes one `.npz` file a case, and tar files, from the Parquet files."""
    stored = pa.concat_tables(pq.read_table(name) for name in cases.parquet).to_pylist()
    (cases.folder / "npz").mkdir()
    (cases.folder / "tar").mkdir()
    for first in range(0, cases.rows, SHARD):
        with tarfile.open(cases.folder / f"tar/{first // SHARD:05}.tar", "w") as archive:
            for number in range(first, min(first + SHARD, cases.rows)):
                row = row_of(cases, stored[number])
                np.savez(cases.folder / f"npz/{number:06}.npz", **row)
                picture, rest = io.BytesIO(), {"case_id": row["case_id"], "table": row["table"].tolist()}
                np.save(picture, row["picture"])
                parts = {"npy": picture.getvalue(), "json": json.dumps(rest).encode(), "txt": row["text"].encode()}
                for suffix, content in parts.items():
                    entry = tarfile.TarInfo(f"{number:06}.{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))


class ParquetRows:
    """One element at a time: the row group that holds it is read, as a first version of a source does it."""

    def __init__(self, cases: Cases) -> None:
        self.cases = cases
        filesystem, place = open_filesystem(cases.url)
        self.names = sorted(
            item.path for item in filesystem.get_file_info(FileSelector(place)) if item.path.endswith(SUFFIX)
        )
        opened = [pq.ParquetFile(filesystem.open_input_file(name)).metadata for name in self.names]
        groups = [(i, g, m.row_group(g).num_rows) for i, m in enumerate(opened) for g in range(m.num_row_groups)]
        self.groups = [(i, g) for i, g, _ in groups]
        self.starts = np.cumsum([0, *(rows for _, _, rows in groups)])
        self.bytes = 0
        self.here = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "here"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, here=threading.local())

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Batch:
        place = int(np.searchsorted(self.starts, index, side="right")) - 1
        number, group = self.groups[place]
        if not hasattr(self.here, "files"):
            filesystem = open_filesystem(self.cases.url)[0]
            self.here.files = [pq.ParquetFile(filesystem.open_input_file(name)) for name in self.names]
        table = self.here.files[number].read_row_group(group, columns=self.cases.columns, use_threads=False)
        self.bytes += table.nbytes
        return row_of(self.cases, table.slice(index - int(self.starts[place]), 1).to_pylist()[0])


class NpzRows:
    """One element at a time, each a file of its own: how small sets are often kept for torch."""

    def __init__(self, cases: Cases) -> None:
        self.folder, self.rows = cases.folder / "npz", cases.rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Batch:
        with np.load(self.folder / f"{index:06}.npz") as stored:
            row = {name: stored[name] for name in stored.files}
        return row | {"case_id": str(row["case_id"]), "text": str(row["text"])}


def row_of(cases: Cases, values: dict[str, Any]) -> Batch:
    """Arrays of one row."""
    picture = np.frombuffer(values[cases.picture], cases.dtype).reshape(cases.shape)
    table = np.array([np.nan if values[name] is None else values[name] for name in NUMBERS], np.float32)
    return {"case_id": values["case_id"], "picture": picture, "table": table, "text": values["text"] or ""}


def columns_of(cases: Cases, table: pa.Table) -> Batch:
    """Arrays of a batch of Arrow columns."""
    pictures = np.stack([np.frombuffer(value.as_buffer(), cases.dtype) for value in table.column(cases.picture)])
    numbers = [table.column(name).to_numpy().astype(np.float32) for name in NUMBERS]
    return {
        "case_id": table.column("case_id").to_pylist(),
        "picture": pictures.reshape(-1, *cases.shape),
        "table": np.stack(numbers, 1),
        "text": [value or "" for value in table.column("text").to_pylist()],
    }


def stacked(rows: list[Batch]) -> Batch:
    """Puts rows together."""
    names = {name: [row[name] for row in rows] for name in rows[0]}
    return names | {name: np.stack(names[name]) for name in ("picture", "table")}


def open_ours(
    cases: Cases, cache: CacheConfig, order: str, threads: bool, stack: ExitStack, counted: dict[str, float]
) -> Passes:
    """r1jax over Parquet: as train.py reads, with two threads and look-ahead, or in the thread that asks."""
    data = DataConfig(order=order, cache=cache)  # type: ignore[arg-type]
    source = FolderCases.open(cases.url, cache=cache)
    order_ = open_order(source, BATCH, data)

    def collate(raw: Batch) -> dict[str, np.ndarray]:
        names = {"case_id": "case_id", "picture": cases.picture, "table": "table", "text": "text"}
        return {name: np.asarray(raw[stored]) for name, stored in names.items()}

    if threads:
        batches = training_batches(source, collate, order_, start=0, threads=data.threads, ahead=data.ahead)
        stack.callback(batches.close)
    else:
        batches = (collate(source.read_batch(order_.batch(k))) for k in itertools.count())

    def one() -> Iterator[Batch]:
        try:
            for _ in range(cases.rows // BATCH):
                yield next(batches)
        finally:
            counted.update(source.counters())

    return one


def open_grain(cases: Cases, stack: ExitStack, counted: dict[str, float]) -> Passes:
    """grain's default form: source -> shuffle -> repeat -> batch -> threads, with its own defaults."""
    source = ParquetRows(cases)
    dataset = grain.MapDataset.source(source).shuffle(seed=0).repeat().batch(BATCH)
    iterator = iter(dataset.to_iter_dataset())
    stack.callback(iterator.close)

    def one() -> Iterator[Batch]:
        try:
            for _ in range(cases.rows // BATCH):
                yield next(iterator)
        finally:
            counted["cold_bytes"] = float(source.bytes)

    return one


def open_torch(cases: Cases, kind: type, workers: int, stack: ExitStack) -> Passes:
    """A torch DataLoader over a map-style data set."""
    from torch.utils.data import DataLoader

    # The forks of a process with threads of Arrow and HDFS may wait for locks without end: a server forks the workers.
    more = {"multiprocessing_context": "forkserver", "persistent_workers": True, "timeout": 120} if workers else {}
    loader = DataLoader(
        kind(cases), BATCH, shuffle=True, num_workers=workers, collate_fn=stacked, drop_last=True, **more
    )

    def end() -> None:
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()

    if workers:
        stack.callback(end)
    return lambda: iter(loader)


def open_hf(cases: Cases, streaming: bool) -> Passes:
    """HF datasets: its memory-mapped Arrow copy with shuffled indices, or a stream with a shuffle buffer."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(cases.folder / "hf"))
    import datasets

    datasets.disable_progress_bars()
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # it would sleep five seconds at the end of every pass
    found = datasets.load_dataset(
        "parquet", data_files=cases.parquet, split="train", streaming=streaming, cache_dir=str(cases.folder / "hf"),
        columns=cases.columns,
    )  # fmt: skip
    found = found.with_format("arrow")
    seeds = iter(range(10**6))

    def one() -> Iterator[Batch]:
        more = {"buffer_size": BUFFER} if streaming else {"keep_in_memory": True}
        for table in found.shuffle(seed=next(seeds), **more).iter(BATCH, drop_last_batch=True):
            yield columns_of(cases, table)

    return one


def open_webdataset(cases: Cases) -> Passes:
    """WebDataset: tar files in shuffled order, and a shuffle buffer."""
    import webdataset

    names = [str(path) for path in sorted((cases.folder / "tar").glob("*.tar"))]

    def row(sample: dict) -> Batch:
        rest = sample["json"]
        table = np.array(rest["table"], np.float32)
        return {"case_id": rest["case_id"], "picture": sample["npy"], "table": table, "text": sample["txt"]}

    stream = webdataset.WebDataset(names, shardshuffle=len(names), empty_check=False).shuffle(BUFFER).decode().map(row)
    return lambda: iter(stream.batched(BATCH, collation_fn=stacked, partial=False))


def absent(module: str) -> str | None:
    """Why a peer cannot take part; None if it can."""
    return None if importlib.util.find_spec(module) else f"{module} is not installed"
