import json
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

from r1jax.train import watch as module
from r1jax.train.history import History, read_history
from r1jax.train.watch import HEARTBEAT, HUNG, Watch, process_start

ROOT = Path(__file__).resolve().parents[2]
HANG = """
import sys, threading
from pathlib import Path
from r1jax.train import watch as module
from r1jax.train.history import History
from r1jax.train.watch import Watch

def a_read_that_blocks():
    threading.Event().wait()

history = History(Path(sys.argv[1]))
history.start(step=0)
module.TICK_S = 0.1
watch = Watch(Path(sys.argv[1]), history, 3600.0)
watch.enter("waiting for data", 7)
watch.timeout = 0.4
a_read_that_blocks()
"""


def opened(tmp_path, monkeypatch, timeout):
    """A watch whose end of the process is only noted."""
    ended = []
    monkeypatch.setattr(module, "TICK_S", 0.02)
    monkeypatch.setattr(os, "_exit", ended.append)
    history = History(tmp_path)
    history.start(step=0)
    return Watch(tmp_path, history, timeout), ended


def test_a_hang_ends_the_process_with_its_stacks(tmp_path):
    done = subprocess.run([sys.executable, "-c", HANG, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == HUNG == 75
    (dump,) = tmp_path.glob("hang-*.txt")
    assert "a_read_that_blocks" in dump.read_text() and "waiting for data" in dump.read_text()
    (line,) = done.stderr.splitlines()
    assert "no progress for 0.4 s after step 7, in: waiting for data" in line and str(dump) in line
    last = read_history(tmp_path)[0][-1]
    assert (last["event"], last["step"], last["phase"]) == ("hung", 7, "waiting for data")


def ticks(tmp_path, monkeypatch, timeout, each, count):
    """Has a watch look so many times, a tick of a clock apart; `each(watch, clock, number)` comes before every look.

    Returns:
      The looks at which it ended the process, had nobody kept it from that.
    """
    clock, ended, numbers = [0.0], [], iter(range(count))
    ready, over = threading.Event(), threading.Event()

    class Looks:
        def wait(self, tick):
            ready.wait()
            self.now = next(numbers, None)
            if self.now is None:
                over.set()
                return True
            clock[0] += tick
            each(watch, clock, self.now)
            return False

        def set(self):
            pass

    looks = Looks()
    monkeypatch.setattr(module, "threading", SimpleNamespace(Event=lambda: looks, Thread=threading.Thread))
    monkeypatch.setattr(os, "_exit", lambda _: ended.append(looks.now))
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    history = History(tmp_path)
    history.start(step=0)
    watch = Watch(tmp_path, history, timeout)
    ready.set()
    assert over.wait(240)
    watch.close()
    return ended


def test_without_progress_it_ends_after_the_time_that_was_given(tmp_path, monkeypatch):
    assert ticks(tmp_path, monkeypatch, 100.0, lambda *_: None, 100)[0] == 99  # a tick is a second


def test_a_jump_of_the_wall_clock_is_no_hang(tmp_path, monkeypatch):
    real, written = time.time(), []

    def jumps(watch, _, now):
        if now in (20, 40):
            monkeypatch.setattr(time, "time", lambda: real + (10**7 if now == 20 else -(10**7)))
            watch.beat()
        if now in (22, 42):
            written.append(json.loads((tmp_path / HEARTBEAT).read_text())["time"] - real)

    assert ticks(tmp_path, monkeypatch, 30.0, jumps, 60) == []
    assert written == [10**7, -(10**7)]


def test_a_suspended_process_is_no_hang(tmp_path, monkeypatch):
    def sleeps_for_days(_, clock, now):
        clock[0] += 10**6 if now == 10 else 0.0

    assert ticks(tmp_path, monkeypatch, 100.0, sleeps_for_days, 90) == []


def test_progress_of_any_kind_puts_the_end_off(tmp_path, monkeypatch):
    def beats(watch, _, now):
        if now == 7:
            watch.beat()
        if now == 14:
            watch.enter("step", 3)

    assert ticks(tmp_path, monkeypatch, 8.0, beats, 23)[0] == 14 + 8


def test_what_another_process_does_may_take_its_time(tmp_path, monkeypatch):
    def reads(watch, _, now):
        if now == 5:
            waiting.enter_context(watch.left_to_another(True))
        if now == 40:
            waiting.close()

    with ExitStack() as waiting:
        assert ticks(tmp_path, monkeypatch, 8.0, reads, 60)[0] == 40 + 8


def test_zero_lets_a_run_wait(tmp_path, monkeypatch):
    assert ticks(tmp_path, monkeypatch, 0.0, lambda *_: None, 10**5) == []


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
        watch._write()
    watch.close()
    assert capsys.readouterr().err.count("no heartbeat") == 1


def test_a_dead_process_has_no_start():
    child = subprocess.Popen(["true"])
    child.wait()
    assert process_start(child.pid) is None
