"""Processes side by side: how many at once, on which GPU and cores, and what waits."""

import json
import os
import time

import pytest

from benchmarks.lanes import run_lanes

TELL = "import json, os; print(json.dumps([os.environ.get('CUDA_VISIBLE_DEVICES'), sorted(os.sched_getaffinity(0))]))"


def commands(folder, *names):
    return {name: ["-c", f"import time; time.sleep(.3); {TELL}; open({str(folder / name)!r}, 'w')"] for name in names}


def test_what_waits_begins_when_it_is_ready_and_what_never_is_is_left_out(tmp_path):
    ready = {"a": lambda: True, "b": (tmp_path / "a").exists, "c": lambda: False}
    lanes = run_lanes(commands(tmp_path, *ready), lambda name: ready[name](), jobs=2, gpus=2, logs=tmp_path / "logs")
    ended = [one for one in lanes if one is not None]
    assert [(one.name, one.code) for one in ended] == [("a", 0), ("b", 0)]
    assert all(one.seconds > 0.2 for one in ended)
    assert not (tmp_path / "c").exists()


def test_processes_share_gpus_and_cores(tmp_path):
    lanes = run_lanes(
        commands(tmp_path, "a", "b", "c"), lambda _: True, jobs=2, gpus=2, logs=tmp_path, ahead=frozenset({"a"})
    )
    assert {one.name for one in lanes if one} == {"a", "b", "c"}
    gpus, cores = zip(*(json.loads((tmp_path / f"{name}.log").read_text()) for name in "abc"), strict=True)
    assert gpus[:2] == ("0", "1")
    every = sorted(os.sched_getaffinity(0))
    assert cores[0] == every
    assert len(cores[1]) == len(cores[2]) == max(1, len(every) // 2)


def test_the_exit_code_and_the_last_words_are_kept(tmp_path):
    lanes = run_lanes({"bad": ["-c", "import sys; sys.exit('no')"]}, lambda _: True, jobs=1, gpus=0, logs=tmp_path)
    assert [(one.name, one.code) for one in lanes if one] == [("bad", 1)]
    assert (tmp_path / "bad.log").read_text() == "no\n"


def test_processes_end_with_who_has_started_them(tmp_path):
    words = ["-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
    lanes, log = run_lanes({"long": words}, lambda _: True, jobs=1, gpus=0, logs=tmp_path), tmp_path / "long.log"
    for _ in range(1200):  # a minute
        if log.exists() and log.read_text():
            break
        assert next(lanes) is None
        time.sleep(0.05)
    lanes.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)
