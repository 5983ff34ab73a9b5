import json
import os
import subprocess
import sys
import time
from pathlib import Path

from r1jax.train import watch as module
from r1jax.train.history import History, read_history
from r1jax.train.watch import HEARTBEAT, HUNG, Watch, process_start

ROOT = Path(__file__).resolve().parents[2]
HANG = """
import sys, threading
from pathlib import Path
from r1jax.train.history import History
from r1jax.train.watch import Watch

def a_read_that_blocks():
    threading.Event().wait()

history = History(Path(sys.argv[1]))
history.start(step=0)
watch = Watch(Path(sys.argv[1]), history, 0.4)
watch.enter("waiting for data", 7)
a_read_that_blocks()
"""


def wait_for(holds):
    for _ in range(500):
        if holds():
            return
        time.sleep(0.02)
    raise AssertionError("it never came")


def opened(tmp_path, monkeypatch, timeout):
    """A watch whose end of the process is only noted."""
    ended = []
    monkeypatch.setattr(module, "TICK_S", 0.02)
    monkeypatch.setattr(os, "_exit", ended.append)
    history = History(tmp_path)
    history.start(step=0)
    return Watch(tmp_path, history, timeout), ended


def test_a_hang_ends_the_process_with_its_stacks(tmp_path):
    done = subprocess.run([sys.executable, "-c", HANG, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == HUNG == 75
    (dump,) = tmp_path.glob("hang-*.txt")
    assert "a_read_that_blocks" in dump.read_text() and "waiting for data" in dump.read_text()
    (line,) = done.stderr.splitlines()
    assert "no progress for 0.4 s after step 7, in: waiting for data" in line and str(dump) in line
    last = read_history(tmp_path)[0][-1]
    assert (last["event"], last["step"], last["phase"]) == ("hung", 7, "waiting for data")


def test_a_jump_of_the_wall_clock_is_no_hang(tmp_path, monkeypatch):
    watch, ended = opened(tmp_path, monkeypatch, 3600.0)
    now = time.time()
    for jump in (10**7, -(10**7)):
        monkeypatch.setattr(time, "time", lambda jump=jump: now + jump)
        watch.enter("step", abs(jump))
        written = tmp_path / HEARTBEAT
        wait_for(lambda f=written, at=now + jump: f.exists() and json.loads(f.read_text())["time"] == at)
        time.sleep(0.1)
    watch.close()
    assert ended == []


def test_a_suspended_process_is_no_hang(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    watch, ended = opened(tmp_path, monkeypatch, 100.0)
    time.sleep(0.1)
    clock[0] += 10**6  # as if it had slept for days, in one tick
    time.sleep(0.2)
    watch.close()
    assert ended == []


def test_progress_of_any_kind_puts_the_end_off(tmp_path, monkeypatch):
    watch, ended = opened(tmp_path, monkeypatch, 2.0)
    began = time.monotonic()
    while time.monotonic() - began < 3:
        watch.beat()
        time.sleep(0.01)
    assert ended == []
    wait_for(lambda: ended)
    watch.close()
    assert ended[0] == HUNG


def test_zero_lets_a_run_wait(tmp_path, monkeypatch):
    watch, ended = opened(tmp_path, monkeypatch, 0.0)
    time.sleep(0.3)
    watch.close()
    assert ended == []


def test_the_last_heartbeat_says_where_the_run_was(tmp_path, monkeypatch):
    watch, _ = opened(tmp_path, monkeypatch, 0.0)
    watch.enter("evaluation", 12)
    watch.close()
    beat = json.loads((tmp_path / HEARTBEAT).read_text())
    assert (beat["step"], beat["phase"], beat["pid"]) == (12, "evaluation", os.getpid())
    assert beat["process_start"] == process_start(os.getpid()) is not None
    assert not (tmp_path / f".{HEARTBEAT}.draft").exists()


def test_without_a_started_run_there_is_no_heartbeat(tmp_path):
    watch = Watch(tmp_path, History(tmp_path), 60.0)
    watch.enter("step", 1)
    watch.close()
    assert list(tmp_path.iterdir()) == []


def test_a_heartbeat_that_cannot_be_written_is_said_once(tmp_path, monkeypatch, capsys):
    watch, _ = opened(tmp_path, monkeypatch, 0.0)
    watch.workdir = tmp_path / "gone"
    for step in range(5):
        watch.enter("step", step)
        time.sleep(0.05)
    watch.close()
    assert capsys.readouterr().err.count("no heartbeat") == 1


def test_a_dead_process_has_no_start():
    child = subprocess.Popen(["true"])
    child.wait()
    assert process_start(child.pid) is None
