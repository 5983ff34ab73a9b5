"""Batches: resumable at any step, whatever the threads, workers, processes and look-ahead; errors come out clearly."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from r1jax.data.loader import Reader, Share, padded_batches, training_batches
from r1jax.data.order import GlobalOrder, WindowOrder
from r1jax.data.schema import Field, Schema
from r1jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


class Numbers:
    """A source of which case i is the number i; even requests are slow, so that threads finish out of order."""

    name, fingerprint, schema = "numbers", "0", Schema((Field("table", "table", "int64"),))

    def __init__(self, count, pause=0.0):
        self.count, self.pause, self.requests = count, pause, []

    def __len__(self):
        return self.count

    def read_batch(self, indices):
        self.requests.append(len(indices))
        time.sleep(self.pause * (1 + int(indices[0]) % 2))
        return {"case_id": [str(i) for i in indices], "table": np.asarray(indices)}

    def counters(self):
        return {"requests": float(len(self.requests))}


class Large(Numbers):
    """Each batch is 16 MB, far more than a pipe holds."""

    def read_batch(self, indices):
        return {"table": np.repeat(np.asarray(indices)[:, None], 2**19, axis=1)}


class Broken(Numbers):
    """Some case cannot be read."""

    def __init__(self, count, error):
        super().__init__(count)
        self.error = error

    def read_batch(self, indices):
        if 7 in indices:
            raise self.error()
        return super().read_batch(indices)


class Unsendable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def broken():
    return UserError("case 7 is broken: mend it")


def unsendable():
    return Unsendable("left", "right")


class Ahead(Numbers):
    """Remembers what it was told and what it was asked."""

    def __init__(self, count):
        super().__init__(count)
        self.told, self.asked, self.lock = [], [], threading.Lock()

    def prefetch(self, indices):
        with self.lock:
            self.told.append(indices.tolist())

    def read_batch(self, indices):
        with self.lock:
            self.asked.append((np.asarray(indices).tolist(), len(self.told)))
        return super().read_batch(indices)


def collate(raw):
    return {"index": np.asarray(raw["table"])}


def stream(source, order, **how):
    return training_batches(source, collate, order, **{"start": 0, "threads": 1} | how)


def take(number, *args, **how):
    batches = stream(*args, **how)
    try:
        return [batch["index"].tolist() for batch in islice(batches, number)]
    finally:
        batches.close()


@pytest.fixture(scope="module")
def starts():
    return np.array([0, 7, 11, 20, 24, 37], np.int64)


def test_resuming_anywhere_with_anything_else_gives_the_remaining_batches(starts):
    draw, spawned = random.Random(0), 0
    for trial in range(50):
        order = GlobalOrder(37, 8, trial) if trial % 2 else WindowOrder(starts, 8, trial, draw.randint(1, 5))
        whole = [order.batch(k).tolist() for k in range(24)]
        start, processes = draw.randrange(20), draw.choice([1, 2, 4, 8])
        with_workers = trial % 10 == 0  # spawning takes most of the time
        processes = min(processes, 2) if with_workers else processes
        parts = []
        for index in range(processes):
            workers = draw.randint(1, 2) if with_workers and index == 0 else 0
            spawned += workers
            how = {"threads": draw.randint(1, 6), "ahead": draw.randint(0, 9), "share": Share(index, processes)}
            source = Numbers(37, pause=0.0005)
            parts.append(take(24 - start, source, order, start=start, workers=workers, **how))
            assert bool(source.requests) == (not workers)  # workers have a source of their own
        joined = [sum(batch, []) for batch in zip(*parts, strict=True)]
        assert joined == whole[start:], trial
        devices = draw.choice([1, 2, 4, 8])
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        for batch, wanted in zip(joined[:3], whole[start:], strict=False):
            placed = jax.make_array_from_process_local_data(sharding, np.array(batch))
            assert len(placed.sharding.device_set) == devices and np.asarray(placed).tolist() == wanted, trial
    assert spawned >= 5


@pytest.mark.parametrize(("workers", "threads", "start"), [(1, 3, 5), (2, 1, 13), (3, 2, 4)])
def test_workers_give_the_same_batches(starts, workers, threads, start):
    order = WindowOrder(starts, 8, 3, 2)
    read = take(11, Numbers(37, pause=0.001), order, start=start, workers=workers, threads=threads, ahead=3)
    assert read == [order.batch(k).tolist() for k in range(start, start + 11)]


def test_an_uneven_share_is_refused():
    with pytest.raises(UserError, match="batch_size is 8, which 3 processes cannot share"):
        stream(Numbers(9), GlobalOrder(9, 8, 0), share=Share(0, 3))


def test_a_batch_is_read_at_once():
    source = Numbers(20)
    take(3, source, GlobalOrder(20, 5, 0))
    assert set(source.requests) == {5}


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_a_source_is_told_what_comes(threads, ahead):
    source, order = Ahead(64), GlobalOrder(64, 4, 0)
    take(12, source, order, threads=threads, ahead=ahead, start=2)
    known = {tuple(order.batch(k).tolist()): k for k in range(60)}
    told = [known[tuple(batch)] for batch in source.told]
    asked = {known[tuple(batch)]: count for batch, count in source.asked}
    assert len(set(told)) == len(told)  # each batch once
    if not ahead:
        assert told == []
        return
    assert set(told) >= set(range(2 + threads, 14)) and max(told) <= 2 + 12 + 2 * threads + ahead
    if threads == 1:  # several may be overtaken by a thread that reads what another is about to tell
        assert all(told.index(k) < count for k, count in asked.items() if k > 2)


def test_workers_are_told_their_own_batches():
    source, order = Ahead(64), GlobalOrder(64, 4, 0)
    reader = Reader(source, collate, order, share=Share(), ahead=4, stride=3)
    for k in (1, 4, 7):
        reader(k)
    assert source.told == [order.batch(k).tolist() for k in (4, 7, 10, 13)]


@pytest.mark.parametrize("workers", [0, 2])
def test_counters_are_summed_over_processes(workers):
    batches = stream(Numbers(40), GlobalOrder(40, 4, 0), workers=workers)
    try:
        for _ in range(6):
            next(batches)
        assert 6 <= batches.counters()["requests"] <= 6 + 2 * 5
    finally:
        batches.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_a_source_arrive_as_they_are(workers):
    source = Broken(24, broken)
    with pytest.raises(UserError) as caught:
        take(6, source, GlobalOrder(24, 4, 0), workers=workers)
    assert str(caught.value) == "case 7 is broken: mend it"


def test_errors_that_cannot_travel_arrive_as_text():
    with pytest.raises(RuntimeError, match="Unsendable: left and right"):
        take(6, Broken(24, unsendable), GlobalOrder(24, 4, 0), workers=1)


@pytest.mark.parametrize(
    ("number", "large"), [(signal.SIGKILL, False), (signal.SIGSEGV, False), (signal.SIGKILL, True)]
)
def test_a_killed_worker_is_named_and_the_run_goes_on_from_where_it_was(number, large):
    order = GlobalOrder(64, 4, 0)
    batches = stream(Large(64) if large else Numbers(64, pause=0.01), order, workers=2)
    try:
        read = [next(batches)["index"][:, 0].tolist() if large else next(batches)["index"].tolist()]
        pids = [worker.pid for worker in batches.iterator.processes]
        if large:
            time.sleep(1)  # now it is in the midst of a message that is larger than the pipe
        os.kill(pids[1], number)
        with pytest.raises(UserError, match=f"worker 2 of 2 .process {pids[1]}. was killed by {number.name}: run the"):
            while True:
                read.append(np.asarray(next(batches)["index"]).reshape(4, -1)[:, 0].tolist())
        with pytest.raises(UserError, match="worker 2 of 2"):
            next(batches)
    finally:
        batches.close()
    read += take(3, Numbers(64), order, start=len(read))
    assert read == [order.batch(k).tolist() for k in range(len(read))]
    for pid in pids:  # both are gone
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_leave_signals_to_the_training_process(number):
    batches = stream(Numbers(64), GlobalOrder(64, 4, 0), workers=1)
    try:
        next(batches)
        (worker,) = batches.iterator.processes
        os.kill(worker.pid, number)
        for _ in range(8):
            next(batches)
        assert worker.is_alive()
    finally:
        batches.close()
    assert not worker.is_alive()


LEFT = """
import os, sys
from r1jax.data.loader import training_batches
from r1jax.data.order import GlobalOrder
from tests.data.test_loader import Numbers, collate

if __name__ == "__main__":
    batches = training_batches(Numbers(64), collate, GlobalOrder(64, 4, 0), start=0, threads=1, workers=1)
    next(batches)
    print(batches.iterator.processes[0].pid, flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["left", "killed"])
def test_workers_end_with_the_training_process(how, tmp_path):
    (tmp_path / "left.py").write_text(LEFT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "left.py"), how]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == (0 if how == "left" else -9), done.stderr
    pid, end = int(done.stdout), time.monotonic() + 120
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(("count", "size"), [(10, 4), (8, 4), (3, 5), (1, 1)])
def test_padded_batches_cover_every_case_once(count, size):
    seen = []
    for indices, batch, raw in padded_batches(Numbers(count), collate, batch_size=size):
        assert batch["index"].shape == (size,) and len(raw["case_id"]) == size
        assert batch["index"][: len(indices)].tolist() == indices.tolist()
        assert (batch["index"][len(indices) :] == indices[-1]).all()
        seen += indices.tolist()
    assert seen == list(range(count))


def test_parts_of_padded_batches_are_the_batches():
    whole = [batch["index"] for _, batch, _ in padded_batches(Numbers(10), collate, batch_size=4)]
    parts = []
    for index in range(2):
        share = Share(index, 2)
        parts.append([b["index"] for _, b, _ in padded_batches(Numbers(10), collate, batch_size=4, share=share)])
    assert [np.concatenate(pair).tolist() for pair in zip(*parts, strict=True)] == [x.tolist() for x in whole]
