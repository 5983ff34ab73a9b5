"""Processes of a benchmark are measured one at a time, and one that fails leaves the others alone."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.children import follow, run_at_once, run_in_turn, told_command
from r1jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
LONG = 240.0
"""Seconds in which a process comes up on any machine."""
START = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from benchmarks.children import tell, wait_for_turn\n"
TURN = START + "wait_for_turn(); began = time.time(); time.sleep(0.2); tell({'began': began, 'ended': time.time()})"


def words(code):
    return ["-c", code]


def test_a_command_is_told_as_a_shell_takes_it_without_the_folders_of_this_machine(monkeypatch):
    words = ["--output", "/a/some one/found.json", "--data=/c/set/", "--workdir", "../w", "--variants", ""]
    words += ["x=1 data.path=/d/lidc", "train.rules=^volume/=3", "--quant", ".=int8:int8/running", "causal 128/128"]
    monkeypatch.setattr(sys, "argv", ["/r/benchmarks/one.py", *words])
    rest = "--output found.json --data=set --workdir w --variants '' 'x=1 data.path=lidc'"
    rest += " 'train.rules=^volume/=3' --quant .=int8:int8/running 'causal 128/128'"
    assert told_command() == f"python benchmarks/one.py {rest}"


def test_turns_follow_their_order_and_do_not_overlap():
    found = list(run_in_turn({name: words(TURN) for name in "abc"}, ahead=2, timeout=LONG))
    assert [name for name, _ in found] == ["a", "b", "c"]
    assert all(before["ended"] <= after["began"] for (_, before), (_, after) in zip(found, found[1:], strict=False))


def test_processes_at_once_meet(tmp_path):
    """Each ends only once it has seen the other."""
    meet = "from pathlib import Path; own, other = map(Path, sys.argv[1:]); own.touch()\n"
    meet += "while not other.exists(): time.sleep(0.01)\ntell({'met': True})"
    pairs = {"a": [str(tmp_path / "a"), str(tmp_path / "b")], "b": [str(tmp_path / "b"), str(tmp_path / "a")]}
    commands = {name: [*words(START + meet), *pair] for name, pair in pairs.items()}
    assert dict(run_at_once(commands, jobs=2, timeout=LONG)) == {"a": {"met": True}, "b": {"met": True}}


def test_more_devices_than_there_are_to_take_are_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(UserError, match="--devices is 3, but CUDA_VISIBLE_DEVICES names 2: 4,5"):
        next(run_at_once({"a": words("")}, jobs=1, timeout=LONG, devices=3))


SEEN = "import os; began = time.time(); time.sleep(0.5)\n"
SEEN += "tell({'device': os.environ.get('CUDA_VISIBLE_DEVICES'), 'began': began, 'ended': time.time()})"


@pytest.mark.parametrize(("visible", "names"), [(None, ["0", "1"]), ("5,3,7", ["5", "3"])])
def test_processes_are_spread_over_devices_each_of_which_holds_no_more_than_its_jobs(visible, names, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = dict(run_at_once({name: words(START + SEEN) for name in "abcde"}, jobs=1, timeout=LONG, devices=2))
    assert sorted(found) == list("abcde")
    assert [found[name]["device"] for name in "ab"] == names and {row["device"] for row in found.values()} == set(names)
    for device in names:
        rows = sorted((row["began"], row["ended"]) for row in found.values() if row["device"] == device)
        assert all(before[1] <= after[0] for before, after in zip(rows, rows[1:], strict=False))


@pytest.mark.parametrize("visible", [None, "5,3,7"])
def test_with_one_device_processes_see_what_their_caller_sees(visible, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    ((_, found),) = run_at_once({"a": words(START + SEEN)}, jobs=2, timeout=LONG)
    assert found["device"] == visible


@pytest.mark.parametrize("how", ["in turn", "at once"])
def test_a_crash_is_told_with_its_last_words(how):
    commands = {"bad": words("raise SystemExit('no room here')"), "good": words(START + "tell({'fine': 1})")}
    if how == "in turn":
        found = dict(run_in_turn(commands, ahead=1, timeout=LONG))
    else:
        found = dict(run_at_once(commands, jobs=2, timeout=LONG))
    assert "exit code 1" in found["bad"]["error"] and "no room here" in found["bad"]["error"]
    assert found["good"] == {"fine": 1}


def test_a_process_that_does_not_end_is_killed():
    ((_, found),) = run_in_turn({"slow": words(START + "time.sleep(600)")}, ahead=0, timeout=1.0)
    assert "killed" in found["error"]


def test_rows_of_a_process_are_noted_and_its_end_is_that_of_the_case():
    """Other words of a process say nothing; the case that ends it is refused with its last words."""
    script = (
        "import json, os, sys\n"
        "print('loading'); print(json.dumps({'begin': 'a'})); print(json.dumps({'name': 'a', 'ms': 1}))\n"
        "print(json.dumps({'begin': 'b'}), flush=True)\n"
        "sys.stderr.write('out of luck'); sys.stderr.flush(); os._exit(3)"
    )
    rows, pipes = [], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], text=True, **pipes) as process:
        left = follow(process, ["a", "b", "c"], LONG, time.monotonic() + LONG, rows.append)
    assert left == ["c"]
    assert rows == [{"name": "a", "ms": 1}, {"name": "b", "refused": "process ended with 3: out of luck"}]
