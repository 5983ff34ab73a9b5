import json
import os
import signal
import subprocess
import sys

import pytest

from r1jax.train.goodput import RECORD, Clock


@pytest.fixture
def times(monkeypatch):
    """Monotonic and wall time, which tests move."""
    now = {"monotonic": 100.0, "time": 1e9}
    for name in now:
        monkeypatch.setattr(f"time.{name}", lambda name=name: now[name])
    return now


def passes(times, seconds):
    for name in times:
        times[name] += seconds


def test_steps_after_the_checkpoint_and_the_pause_count_as_lost(tmp_path, times):
    first = Clock(tmp_path)
    first.go_on(0)
    passes(times, 40)
    first.useful = 30.0
    first.mark(10, first.useful, [10])
    passes(times, 20)
    first.useful = 50.0  # never marked: killed here
    passes(times, 30)
    times["monotonic"] = 3.0  # another boot
    second = Clock(tmp_path)
    second.go_on(10)
    assert (second.useful, second.seconds) == (30.0, pytest.approx(90.0))
    assert second.goodput == pytest.approx(1 / 3)


def test_falling_back_forgets_later_marks(tmp_path, times):
    clock = Clock(tmp_path)
    for step, useful in ((5, 2.0), (10, 4.0), (15, 6.0)):
        clock.useful = useful
        clock.mark(step, useful, [s for s in (5, 15) if s <= step])
    again = Clock(tmp_path)
    assert again.marks == {5: 2.0, 15: 6.0}
    again.go_on(5)
    assert again.useful == 2.0


@pytest.mark.parametrize("jump", [-5000.0, 5000.0])
def test_wall_clock_jumps(tmp_path, times, jump):
    clock = Clock(tmp_path)
    passes(times, 10)
    times["time"] += jump
    assert clock.seconds == pytest.approx(10)
    clock.write()
    times["time"] -= 7000  # set back between two processes
    again = Clock(tmp_path)
    assert again.seconds == pytest.approx(10)


def test_new_run_in_a_folder_without_checkpoints(tmp_path, times):
    clock = Clock(tmp_path)
    passes(times, 50)
    clock.useful = 40.0
    clock.mark(10, 40.0, [10])
    again = Clock(tmp_path)
    again.go_on(0)
    passes(times, 4)
    assert (again.seconds, again.useful) == (4.0, 0.0)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"seconds": 1}', '{"seconds": 1, "wall": 1, "useful": 3}'])
def test_damaged_record_is_said(tmp_path, times, capsys, content):
    (tmp_path / RECORD).write_text(content)
    clock = Clock(tmp_path)
    assert clock.useful == 0.0 and f"{RECORD} cannot be read" in capsys.readouterr().err


def test_disk_that_takes_nothing_ends_no_run(tmp_path, monkeypatch, capsys):
    clock = Clock(tmp_path)
    before = (tmp_path / RECORD).read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("r1jax.train.goodput.flush", full)
    clock.mark(3, clock.useful, [3])
    assert "No space left on device" in capsys.readouterr().err and (tmp_path / RECORD).read_text() == before


def test_kill_while_writing_leaves_a_whole_record(tmp_path):
    code = f"""
from pathlib import Path
from r1jax.train.goodput import Clock
clock = Clock(Path({str(tmp_path)!r}))
print("ready", flush=True)
step = 0
while True:
    step += 1
    clock.mark(step, clock.useful, range(step + 1))
"""
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert json.loads((tmp_path / RECORD).read_text())["seconds"] >= 0
