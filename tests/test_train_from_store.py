"""Training from HDFS through Redis, by the commands of a user, while servers, files and workers fail."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis

from r1jax.data.card import CARD
from r1jax.data.parquet import ParquetStore
from r1jax.data.parquet_files import chunk_range
from r1jax.serve.data_command import convert
from tests.data.folders import write
from tests.data.services import start_redis
from tests.test_train import ROOT, TINY, command, last_state
from tests.train.experiment import CLOCK
from tests.train.forked import Forked

STEPS = 60
LIMIT_S = 240.0
"""A run that is not over by then hangs; idle machines need a tenth."""
SLOW, SLOWEST, FAST = "0.08", "0.5", "0"
"""Seconds a case; the slowest leaves time for a cache that is tried again every ten seconds."""
COMMON = (
    *("--train.steps", STEPS, "--train.eval_every", 30, "--train.save_every", 5),
    *("--data.plugins", ROOT / "tests/plugins", "--data.preprocess", "pace"),
)
WINDOW = ("--data.order", "window", "--data.window", 3)
COLD = ("--data.cache.url", "None")


@dataclass
class Run:
    """A command under way.

    Attributes:
      process: The command.
      folder: What it writes, its output included.
    """

    process: Forked | subprocess.Popen
    folder: Path

    def pace(self, seconds: str) -> None:
        """Changes how long a case takes."""
        draft = self.folder / "pace.draft"
        draft.write_text(seconds, "utf-8")
        draft.replace(self.folder / "pace")

    def said(self) -> list[str]:
        return (self.folder / "err").read_text("utf-8").splitlines()

    def step(self) -> int:
        path = self.folder / "run/metrics.jsonl"
        return path.read_text().count('"loss"') if path.exists() else 0

    def until(self, ready) -> None:
        end = time.monotonic() + LIMIT_S
        while not ready():
            assert self.process.poll() is None and time.monotonic() < end, "\n".join(self.said())
            time.sleep(0.02)

    def until_said(self, words: str, times: int = 1) -> None:
        self.until(lambda: sum(words in line for line in self.said()) >= times)

    def after(self, steps: int) -> None:
        """Waits until so many more steps are done."""
        goal = self.step() + steps
        self.until(lambda: self.step() >= goal)

    def end(self) -> int:
        try:
            return self.process.wait(timeout=LIMIT_S)
        finally:
            self.process.kill()

    def error(self) -> str:
        """The one error that ended it, after its exit code was looked at."""
        assert self.end() == 2, "\n".join(self.said())
        errors = [line for line in self.said() if line.startswith("error:")]
        assert len(errors) == 1 and not any("Traceback" in line for line in self.said()), self.said()
        return errors[0]


@pytest.fixture(scope="module")
def go(trainings):
    """Starts train.py or eval.py in a folder; all share one cache of compiled programs."""
    scored = []

    def run(folder: Path, data, *flags, pace: str = FAST, script: str = "train.py", timeout_s: float = 30.0) -> Run:
        folder.mkdir(exist_ok=True)
        environment = {"TEST_PACE": str(folder / "pace"), "TEST_TIMEOUT_S": str(timeout_s)}
        (folder / "pace").write_text(pace, "utf-8")
        words, files = [*flags, "--data.path", data], (folder / "out", folder / "err")
        if script == "train.py":
            words += ["--config", TINY, "--workdir", folder / "run", *COMMON]
            return Run(trainings.start(*files, *words, **environment), folder)
        with files[0].open("w") as out, files[1].open("w") as err:
            command = [sys.executable, str(ROOT / script), *map(str, words)]
            environment = trainings.environment | environment
            scored.append(subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT, env=environment))
        return Run(scored[-1], folder)

    yield run
    for process in scored:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Path:
    """A folder of cases with volumes, records and words."""
    draw = np.random.default_rng(0)
    n = 48
    return write(
        tmp_path_factory.mktemp("data") / "cases",
        volume=draw.integers(-1000, 400, (n, 16, 16, 16)).astype(np.int16),
        age=draw.integers(40, 80, n),
        text=np.array([f"咳嗽 {i}" for i in range(n)]),
        nodule_present=np.arange(n) // 4 % 2,
        malignancy=np.arange(n) // 8 % 2,
        split=np.where(np.arange(n) % 4, "train", "val"),
    )


def store(cases: Path, url: str) -> str:
    """Converts the folder as a user does, into files of several row groups."""
    assert convert([str(cases), url, "--group-rows", "2", "--shard-rows", "20"]) == 0
    return url


@pytest.fixture(scope="module")
def remote(cases, hdfs) -> str:
    return store(cases, f"{hdfs.url}/{cases.parent.name}")


@pytest.fixture(scope="module")
def local(cases) -> str:
    return store(cases, str(cases.parent / "parquet"))


@pytest.fixture(scope="module")
def undisturbed(go, cases, shared) -> Path:
    """A run on the folder itself, without any store or cache; one for all workers of this test run."""
    folder = shared / "from-a-folder"
    with (shared / "from-a-folder.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "whole").exists():
            run = go(folder, cases)
            assert run.end() == 0, "\n".join(run.said())
            (folder / "whole").touch()
    return folder


def figures(folder: Path) -> list[dict]:
    """Rows of metrics.jsonl without what depends on the clock, or on where cases come from."""
    found = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK and not k.startswith("cache.")} for row in found]


def assert_same_end(run: Run, reference: Path) -> None:
    assert run.end() == 0, "\n".join(run.said())
    (step, got), (_, wanted) = last_state(run.folder / "run"), last_state(reference / "run")
    assert step == STEPS and got.keys() == wanted.keys() and len(got) > 100
    different = [name for name, x in wanted.items() if x.tobytes() != got[name].tobytes()]
    assert not different, f"{len(different)} arrays differ, such as {different[0]}"
    assert figures(run.folder) == figures(reference)
    assert not any(word in line for line in run.said() for word in ("Traceback", "Exception", "Warning")), run.said()


@contextmanager
def rubbish(port: int):
    """Answers everybody with what is no answer."""
    listener = socket.create_server(("127.0.0.1", port))
    answered = threading.Event()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\nrubbish\r\n" * 20)
                    answered.set()
                except OSError:
                    pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield answered
    finally:
        listener.close()
        thread.join(5)


def spoil(client: redis.Redis) -> None:
    """Turns every stored row group into another text of the same length."""
    for key in client.scan_iter("*"):
        if client.type(key) == b"string" and not key.endswith(b":lease"):
            client.set(key, os.urandom(client.strlen(key)))


def fill(client: redis.Redis) -> None:
    """Leaves no room for another value."""
    client.flushall()
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", client.info("memory")["used_memory"] + 2**17)
    with pytest.raises(redis.ResponseError):
        for number in range(10**6):
            client.set(f"other {number}", bytes(1000))


@pytest.mark.slow
def test_redis_fails_in_every_way_while_training(go, remote, undisturbed, tmp_path, tmp_path_factory):
    with start_redis(tmp_path_factory.mktemp("r")) as server:
        name = server.url
        flags = ("--data.cache.url", name, "--data.cache.capacity", 1)  # no room in memory: every read asks Redis
        run = go(tmp_path / "a", remote, *flags, pace=SLOW)
        with redis.Redis.from_url(name) as client:
            run.after(4)
            client.flushall()
            run.after(4)
            assert run.said()[-1].startswith("compiling the step"), run.said()  # an empty cache is no event
            spoil(client)
            run.until_said("gave values that are damaged")
            fill(client)
            run.until_said("takes no more values")
            server.process.send_signal(signal.SIGSTOP)
            run.until_said("does not answer (TimeoutError")
            run.pace(SLOWEST)
            server.process.send_signal(signal.SIGCONT)
            run.until_said("answers again")
            run.pace(SLOW)
        server.process.kill()
        server.process.wait()
        run.until_said("does not answer", 2)
        run.pace(SLOWEST)
        with rubbish(server.port) as answered:
            run.until(answered.is_set)  # it is tried again
            run.pace(FAST)
            assert_same_end(run, undisturbed)
    told = [line for line in run.said() if line.startswith("cache ")]
    logged = [json.loads(line) for line in (run.folder / "run/metrics.jsonl").read_text().splitlines()]
    last = [row for row in logged if "cache.hit_rate" in row][-1]
    assert last["step"] == STEPS and 0 < last["cache.hit_rate"] < 1 and last["cache.rejected"] > 0
    assert last["cache.breaker_open"] == 1
    (summary,) = [line for line in run.said() if line.startswith("cache: ")]
    assert "lookups" in summary and "in LMDB or Redis" in summary and "MiB" in summary
    assert len(told) == 5 and all(line.startswith(f"cache {name} ") for line in told), told


@pytest.mark.slow
def test_windows_of_row_groups_and_workers_one_of_which_is_killed(go, local, remote, tmp_path, tmp_path_factory):
    reference = go(tmp_path / "local", local, *WINDOW, *COLD)
    with start_redis(tmp_path_factory.mktemp("r")) as server:
        flags = (*WINDOW, "--data.cache.url", server.unix_url, "--data.workers", 2)
        run = go(tmp_path / "a", remote, *flags, pace=SLOW)
        run.after(7)
        server.process.kill()
        run.after(4)
        listed = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
        workers = [int(pid) for pid in listed if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(workers[-1], signal.SIGKILL)
        message = run.error()
        assert "data worker" in message and "was killed by SIGKILL" in message and "same command again" in message
        again = go(tmp_path / "a", remote, *flags)
        assert reference.end() == 0, "\n".join(reference.said())
        assert_same_end(again, reference.folder)
        assert any("goes on from" in line for line in again.said())
    found = []
    for data, folder in ((remote, again.folder), (local, reference.folder)):  # Redis is gone, which is no matter here
        words = ("--checkpoint", folder / "run", "--data.split", "val", "--output", folder / "eval")
        scored = go(folder, data, *words, script="eval.py")
        assert scored.end() == 0, "\n".join(scored.said())
        assert not any(line.startswith("cache ") for line in scored.said()), scored.said()
        found.append(json.loads((folder / "eval/metrics.json").read_text()))
        assert found[-1].pop("provenance")["data"]
    assert found[0] == found[1] and "both" in found[0]


@pytest.mark.slow
def test_datanode_is_killed_and_comes_back(go, hdfs, remote, undisturbed, tmp_path):
    run = go(tmp_path / "a", remote, *COLD, pace=SLOW, timeout_s=4)
    run.after(7)
    hdfs.kill_datanode()
    try:
        start = time.monotonic()
        message = run.error()
        assert time.monotonic() - start < 150  # the stated limit, and what the machine does meanwhile
    finally:
        hdfs.start_datanode()
    assert f"error: {remote}/part-0" in message and "DataNodes failed" in message
    assert "check the server and run the command again" in message, message
    assert sum("trying again for" in line for line in run.said()) >= 1
    assert_same_end(go(tmp_path / "a", remote, *COLD), undisturbed)


@pytest.mark.slow
def test_a_bit_of_a_page_is_flipped(go, local, undisturbed, tmp_path):
    copy = Path(shutil.copytree(local, tmp_path / "copy"))
    part = ParquetStore.open(str(copy)).parts[1]
    places = []
    for group in range(part.metadata.num_row_groups):
        chunks = [part.metadata.row_group(group).column(i) for i in range(part.metadata.num_columns)]
        first, length = next(chunk_range(chunk) for chunk in chunks if chunk.path_in_schema == "volume")
        places.append(first + length // 2)
    path = copy / part.name
    good = path.read_bytes()
    run = go(tmp_path / "a", copy, *COLD, pace=SLOW)
    run.after(7)
    with path.open("r+b") as file:  # in place: the run has the file open
        for place in places:
            file.seek(place)
            file.write(bytes([good[place] ^ 4]))
    message = run.error()
    assert f"{path}: row group " in message and "is damaged" in message and "r1jax data verify" in message
    path.write_bytes(good)
    assert_same_end(go(tmp_path / "a", copy, *COLD), undisturbed)


@pytest.mark.parametrize("kind", ["missing column", "wrong type", "column of one file", "cut short"])
def test_bad_files_are_refused_before_training(monkeypatch, capsys, cases, local, tmp_path, kind):
    monkeypatch.chdir(ROOT)
    copy = Path(shutil.copytree(local, tmp_path / "copy"))
    (copy / CARD).unlink()  # as another program would have written them
    changed = sorted(copy.glob("*.parquet"))
    for path in changed[:1] if kind in ("column of one file", "cut short") else changed:
        table = pq.read_table(path)
        if kind == "cut short":
            path.write_bytes(path.read_bytes()[:-100])
            continue
        if kind == "wrong type":
            place = table.schema.get_field_index("nodule_present")
            table = table.set_column(place, "nodule_present", pa.array(["yes"] * len(table)))
        else:
            table = table.drop_columns(["nodule_present", "malignancy"] if kind == "missing column" else ["age"])
        pq.write_table(table, path, write_page_checksum=True)
    words = ("--config", TINY, "--data.path", copy, "--workdir", tmp_path / "run", "--task.fields", "nodule_present")
    code, out, err = command(monkeypatch, capsys, *words)
    assert code == 2 and out == "" and [line for line in err if line.startswith("error:")] == err[-1:], err
    told = {"wrong type": "nodule_present", "missing column": "nodule_present", "column of one file": "'age'"}
    assert told.get(kind, changed[0].name) in err[-1] and str(copy) in err[-1] or changed[0].name in err[-1], err
    assert not (tmp_path / "run").exists()
