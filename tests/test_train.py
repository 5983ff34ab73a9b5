"""The training command as a user runs it: killed, stopped, started again, given bad input."""

import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import train
from r1jax.errors import run_main
from r1jax.train.checkpoints import CheckpointFolder
from r1jax.train.history import read_history
from tests.train.experiment import CLOCK
from tests.train.forked import signal_at

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests" / "train" / "tiny.py"
STEPS = 48
COMMON = ("--train.steps", STEPS, "--train.accumulation", 2)


@pytest.fixture(scope="module")
def start(trainings):
    """Starts train.py on the tiny experiment; its output goes to files of a folder."""

    def run(folder, *flags, before="", limit=None):
        words = ["--config", TINY, *COMMON, *flags]
        if not limit:
            return trainings.start(folder / "out", folder / "err", *words, before=before)
        # Its pages of tracebacks pass through cat, which has no limit: cut off, they end the process with code 1.
        piped = 'set -o pipefail; { prlimit "$@" 2>&1 >&3 | cat >&2; } 3>&1'
        limited = ["bash", "-c", piped, "bash", f"--fsize={limit}", sys.executable, str(ROOT / "train.py")]
        with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
            return subprocess.Popen(
                [*limited, *map(str, words)], stdout=out, stderr=err, cwd=ROOT, env=trainings.environment
            )

    return run


def finish(process, folder):
    """Waits; returns exit code, stdout and the lines of stderr."""
    try:
        code = process.wait(timeout=200)
    finally:
        process.kill()
    return code, (folder / "out").read_text(), (folder / "err").read_text().splitlines()


def rows(workdir):
    """Rows of metrics.jsonl without what depends on the clock."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def last_state(workdir):
    """All arrays of the newest checkpoint, by name, after its bytes were verified."""
    newest = CheckpointFolder(workdir / "checkpoints").all()[-1]
    newest.verify()
    with ocp.PyTreeCheckpointer() as checkpointer:
        structure = checkpointer.metadata(newest.path.absolute() / "state").item_metadata.tree
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), structure)
        state = checkpointer.restore(newest.path.absolute() / "state", restore_args=numpy)
    return newest.step, {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(state)}


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same_end(workdir, reference):
    (step, got), (expected_step, expected) = last_state(workdir), last_state(reference)
    assert step == expected_step == STEPS
    assert got.keys() == expected.keys() and len(got) > 100
    different = [name for name, x in expected.items() if x.tobytes() != got[name].tobytes()]
    assert not different, f"{len(different)} arrays differ, such as {different[0]}"
    assert rows(workdir) == rows(reference)
    names = [sorted(os.listdir(folder / "checkpoints")) for folder in (workdir, reference)]
    assert names[0] == names[1] and all(name.isdigit() for name in names[0])


@pytest.fixture(scope="module")
def reference(tmp_path_factory, shared, start):
    """Folder of a run that nothing disturbed; one for all workers."""
    here = tmp_path_factory.mktemp("reference")
    folder = shared / "undisturbed"
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            code, out, err = finish(start(here, "--workdir", here / "run"), here)
            assert code == 0, "\n".join(err)
            assert "malignancy" in out and "eval.py --checkpoint" in out
            (here / "run").rename(folder)
    return folder


STOPS = (
    ("r1jax.telemetry:Telemetry.log", signal.SIGTERM),
    ("r1jax.train.checkpoints:_write_arrays", signal.SIGKILL),
    ("r1jax.telemetry:Telemetry.log", signal.SIGUSR1),
    ("r1jax.train.recover:compile_step", signal.SIGKILL),
    ("r1jax.telemetry:Telemetry.log", signal.SIGKILL),
    ("r1jax.telemetry:Telemetry.log", signal.SIGINT),
    ("r1jax.train.checkpoints:_seal", signal.SIGKILL),
    ("r1jax.train.goodput:Clock.mark", signal.SIGKILL),
)
"""What is called when a signal comes: a row is written, or arrays, or they are written and not yet sealed; the step is
compiled; a checkpoint is published."""
CALLS = {"log": (2, 5), "_write_arrays": (2, 2), "_seal": (2, 2), "compile_step": (1, 1), "mark": (1, 2)}
"""First and last of the calls of a process after which it may come; the second save leaves one behind."""
DELAY_S = {"log": 0.05, "_write_arrays": 0.03}
"""Longest time from the call to the signal, where it is not at once."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stopped_and_killed_at_eight_points(reference, start, tmp_path):
    """Where a batch is read by a worker, has two parts, and drops out; the end is that of a run without workers."""
    workdir, draw, torn = tmp_path / "run", random.Random(0), 0
    flags = ("--workdir", workdir, "--data.workers", 1)
    for where, number in STOPS:
        name = where.split(":")[1].split(".")[-1]
        point = {"call": draw.randint(*CALLS[name]), "delay": draw.uniform(0, DELAY_S.get(name, 0.0))}
        code, _, err = finish(start(tmp_path, *flags, before=signal_at(where, number, **point)), tmp_path)
        if number == signal.SIGKILL:
            assert code == -number, "\n".join(err)
            torn += any((workdir / "checkpoints").glob(".draft-*/state/*"))
            continue
        assert code == 128 + number, "\n".join(err)
        newest = CheckpointFolder(workdir / "checkpoints").all()[-1]
        said = f"{number.name}: saved at step {newest.step}; the same command goes on from there"
        assert newest.step < STEPS and err.count(said) == 1
    assert torn, "no kill has met a checkpoint that is not sealed"
    code, out, err = finish(start(tmp_path, *flags), tmp_path)
    assert code == 0 and "eval.py --checkpoint" in out, "\n".join(err)
    events = [row["event"] for row in read_history(workdir)[0]]
    assert events.count("stopped") == 3 and events[-1] == "ended"
    assert_same_end(workdir, reference)


HANGS = {
    "next_batch": """
from r1jax.data.synthetic import SyntheticCases
reads, read = 0, SyntheticCases.read_batch

def a_source_that_hangs(self, rows):
    global reads
    reads += self.name.endswith("train")
    return read(self, rows) if reads < 12 else hang()

SyntheticCases.read_batch = a_source_that_hangs
""",
    "take_step": """
def a_step_that_hangs(state, batch, limit):
    return step(state, batch, limit) if int(state.step) < 30 else hang()

compiled = recover.compile_step

def compile_step(*arguments):
    global step
    step = compiled(*arguments)
    return a_step_that_hangs

recover.compile_step = compile_step
""",
}
HUNG = """
import threading
from r1jax.train import recover
from r1jax.train.loop import Loop

{what}
{method} = Loop.{method}

def watched(self, done, *batch):
    global run
    run = self.run
    return {method}(self, done, *batch)

def hang():
    run.watch.timeout = 2.0  # from here on: whatever comes before may take longer
    threading.Event().wait()

Loop.{method} = watched
"""


@pytest.mark.slow
def test_a_run_that_hangs_ends_and_the_same_command_goes_on(reference, start, tmp_path):
    workdir = tmp_path / "run"
    for method, what in HANGS.items():
        before = HUNG.format(what=what, method=method)
        code, _, err = finish(start(tmp_path, "--workdir", workdir, before=before), tmp_path)
        assert code == 75, "\n".join(err)
        *_, last = read_history(workdir)[0]
        (dump,) = (path for path in workdir.glob("hang-*.txt") if str(path) in err[-1])
        assert last["event"] == "hung" and "no progress for 2 s after step" in err[-1]
        assert re.search(r"in a_\w+_that_hangs", dump.read_text())
        (newest, *_), damaged = CheckpointFolder(workdir / "checkpoints").verify()
        assert damaged == [] and 0 < newest.step <= last["step"] < STEPS
    code, _, err = finish(start(tmp_path, "--workdir", workdir), tmp_path)
    assert code == 0, "\n".join(err)
    assert_same_end(workdir, reference)


def test_finished_run_again(reference, start, tmp_path):
    workdir = shutil.copytree(reference, tmp_path / "run")
    before = content(workdir)
    code, out, err = finish(start(tmp_path, "--workdir", workdir), tmp_path)
    assert code == 0, "\n".join(err)
    assert "malignancy" in out and f"eval.py --checkpoint {workdir}" in out
    assert content(workdir) == before


def test_second_run_in_one_folder(reference, start, tmp_path):
    workdir = shutil.copytree(reference, tmp_path / "run")
    before = content(workdir)
    with (workdir / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, out, err = finish(start(tmp_path, "--workdir", workdir), tmp_path)
    assert code == 2 and out == ""
    assert err[-1] == f"error: another process is training in {workdir}: wait for it or choose another --workdir"
    assert content(workdir) == before


def test_full_disk(reference, start, tmp_path):
    """Files cannot grow beyond a size that the arrays need, so TensorStore fails in the midst of writing."""
    workdir = tmp_path / "run"
    code, _, err = finish(start(tmp_path, "--workdir", workdir, limit=60_000), tmp_path)
    assert code == 2, "\n".join(err[-20:])
    # Not at the start of its line: Orbax's threads still write when the sentence comes, and may leave a draft.
    assert "\n".join(err).count(f"error: checkpoint {workdir / 'checkpoints' / '00000003'} could not be written") == 1
    assert set(os.listdir(workdir / "checkpoints")) <= {".draft-00000003"}
    code, _, err = finish(start(tmp_path, "--workdir", workdir), tmp_path)
    assert code == 0, "\n".join(err)
    assert_same_end(workdir, reference)  # nor is one left now


def test_dry_run(reference, start, tmp_path):
    workdir = tmp_path / "run"
    code, out, err = finish(start(tmp_path, "--workdir", workdir, "--dry-run"), tmp_path)
    assert code == 0, "\n".join(err)
    figures = {line.rsplit("  ", 1)[0].strip(): line.rsplit("  ", 1)[1] for line in out.splitlines()}
    params = sum(x.size for k, x in last_state(reference)[1].items() if k.startswith("['params']"))
    assert figures["parameters"].startswith(f"{params:,} ")
    assert float(figures["FLOPs an example"].replace(",", "")) > 0
    assert figures["state a device"].endswith("MiB")
    assert not workdir.exists() and sorted(os.listdir(tmp_path)) == ["err", "out"]


def test_gpu_that_is_not_there(start, tmp_path):
    code, out, err = finish(start(tmp_path, "--workdir", tmp_path / "run", "--platform", "cuda"), tmp_path)
    assert code == 2 and out == ""
    assert [line.startswith("error: --platform cuda: JAX finds no such device") for line in err] == [True]
    assert not (tmp_path / "run").exists()


def test_no_traceback_from_the_command(start, tmp_path):
    (tmp_path / "cases").mkdir()
    (tmp_path / "cases" / "part.npz").write_bytes(b"PK\x03\x04 no archive")
    flags = ("--workdir", tmp_path / "run", "--data.path", tmp_path / "cases")
    code, out, err = finish(start(tmp_path, *flags), tmp_path)
    assert code == 2 and out == "" and not (tmp_path / "run").exists()
    assert [line for line in err if line.startswith("error:")] == err[-1:] and "part.npz is damaged" in err[-1]
    assert not any("Traceback" in line for line in err)


def command(monkeypatch, capsys, *words):
    """Runs the command in this process; returns exit code, stdout and the lines of stderr."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        run_main(train.main)
    said = capsys.readouterr()
    return left.value.code, said.out, said.err.splitlines()


BAD = {
    "no config": ([], "--config"),
    "missing config": (["--config", "configs/medicla.py"], "does not exist (did you mean 'configs/medical.py'?)"),
    "unknown field": (
        ["--config", TINY, "--train.step", "5"],
        "'--train.step' (did you mean '--train.steps'?)",
    ),
    "wrong type": (["--config", TINY, "--train.steps", "many"], "--train.steps is 'many', but it must be"),
    "out of range": (["--config", TINY, "--model.dropout", "1"], "--model.dropout is '1', but it must be"),
    "fields that clash": (
        ["--config", TINY, "--train.warmup_steps", "24"],
        "train.warmup_steps is 24, but it must",
    ),
    "unknown finding": (["--config", TINY, "--task.fields", "malignacy"], "did you mean 'malignancy'?"),
    "small vocabulary": (["--config", TINY, "--model.decoder.vocab_size", "100"], "model.decoder.vocab_size is 100"),
    "odd batch": (["--config", TINY, "--train.batch_size", "3"], "train.batch_size is 3, which is no multiple of"),
    "odd mesh": (["--config", TINY, "--mesh.data", "3", "--mesh.fsdp", "5"], "does not fit 8 device(s)"),
    "no data": (["--config", TINY, "--data.path", "no/such/folder"], "there is no folder no/such/folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(monkeypatch, capsys, tmp_path, name):
    monkeypatch.chdir(ROOT)
    words, expected = BAD[name]
    existing = tmp_path / "run"
    existing.mkdir()
    (existing / "metrics.jsonl").write_text('{"step": 1}\n')
    before = content(tmp_path)
    code, out, err = command(monkeypatch, capsys, *words, "--workdir", existing)
    assert code == 2 and out == ""
    assert [line for line in err if line.startswith("error:")] == err[-1:], err
    assert expected in err[-1]
    assert content(tmp_path) == before


@pytest.mark.parametrize("kind", ["empty folder", "text", "cut short", "objects", "file"])
def test_bad_data(monkeypatch, capsys, tmp_path, kind):
    cases = tmp_path / "cases"
    cases.mkdir()
    file = cases / "part.npz"
    np.savez(file, volume=np.zeros((4, 16, 16, 16), np.int16), case_id=np.array(list("abcd")))
    if kind == "empty folder":
        file.unlink()
    elif kind == "text":
        file.write_text("volume")
    elif kind == "cut short":
        file.write_bytes(file.read_bytes()[:5000])
    elif kind == "objects":
        np.savez(file, volume=np.array([{}, {}]), case_id=np.array(["a", "b"]))
    else:
        cases = file
    code, out, err = command(monkeypatch, capsys, "--config", TINY, "--data.path", cases, "--workdir", tmp_path / "run")
    assert code == 2 and out == "" and str(cases) in err[-1]
    assert [line for line in err if line.startswith("error:")] == err[-1:], err
    assert not (tmp_path / "run").exists()


def test_print_config(monkeypatch, capsys, tmp_path):
    words = ("--config", TINY, "--train.steps", "30", "--workdir", tmp_path / "run", "--print-config")
    code, out, _ = command(monkeypatch, capsys, *words)
    assert code == 0 and json.loads(out)["train"]["steps"] == 30
    assert not (tmp_path / "run").exists()
