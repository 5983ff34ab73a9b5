import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from r1jax.errors import UserError, nearest, run_main

ROOT = Path(__file__).resolve().parents[1]


def test_nearest_names_the_closest_option():
    assert nearest("stps", ["steps", "seed"]) == " (did you mean 'steps'?)"
    assert nearest("qqqq", ["steps", "seed"]) == ""
    assert nearest("size", ["model.volume.size"], cutoff=0.0) == " (did you mean 'model.volume.size'?)"


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_exit_code_is_what_main_returns(monkeypatch, returned, code):
    monkeypatch.setattr(sys, "argv", ["prog", "--a", "1"])
    seen = []

    def main(arguments: list[str]) -> int | None:
        seen.extend(arguments)
        return returned

    with pytest.raises(SystemExit) as left:
        run_main(main)
    assert left.value.code == code
    assert seen == ["--a", "1"]


def test_user_error_is_one_line_on_stderr(capsys):
    def main(arguments: list[str]) -> int | None:
        raise UserError("the file 'x' is empty.")

    with pytest.raises(SystemExit) as left:
        run_main(main)
    assert left.value.code == 2
    assert capsys.readouterr() == ("", "error: the file 'x' is empty.\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
def test_a_full_disk_is_one_line_too(capsys):
    def main(arguments: list[str]) -> int | None:
        with open("/dev/full", "w") as file:
            file.write("x")

    with pytest.raises(SystemExit) as left:
        run_main(main)
    line = "error: [Errno 28] No space left on device: make room, and run the same command again\n"
    assert left.value.code == 2 and capsys.readouterr() == ("", line)


@pytest.mark.parametrize("failure", [FileNotFoundError(2, "No such file"), OSError(5, "Input/output error")])
def test_other_failures_of_files_keep_their_traceback(failure):
    def main(arguments: list[str]) -> int | None:
        raise failure

    with pytest.raises(OSError) as caught:
        run_main(main)
    assert caught.value is failure


def test_other_errors_keep_their_traceback():
    def main(arguments: list[str]) -> int | None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_main(main)


def start(body: str, **pipes) -> subprocess.Popen:
    """A process of its own that runs `body` as main."""
    code = f"from r1jax.errors import run_main\ndef main(arguments):\n    {body}\nrun_main(main)"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stderr=subprocess.PIPE, **pipes)


def test_interrupt_is_quiet():
    # A shell has what it starts in the background ignore SIGINT, and its children inherit that.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = start(f"{heed}; import time; print('up', flush=True); time.sleep(60)", stdout=subprocess.PIPE)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=240)
    assert (process.returncode, complaint) == (130, "")


def test_a_reader_that_left_is_no_crash():
    reader, writer = os.pipe()
    os.close(reader)
    process = start("print('x' * 100_000)", stdout=writer)
    os.close(writer)
    _, complaint = process.communicate(timeout=240)
    assert (process.returncode, complaint) == (141, "")


def test_a_request_under_way_does_not_crash_the_end(tmp_path):
    """A thread that comes back from C++ while Python ends would abort it (code 134)."""
    (tmp_path / "late.py").write_text(
        """
import time

class Late:
    def __del__(self, sleep=time.sleep):
        sleep(2)  # Python's end takes long enough for the thread to come back

late = Late()
"""
    )
    (tmp_path / "program.py").write_text(
        """
import io, sys, time

import pyarrow

import late
from r1jax.data.bounded import bounded
from r1jax.errors import run_main

class Slow(io.RawIOBase):
    def readable(self):
        return True

    def readinto(self, buffer):
        time.sleep(1)
        return len(buffer)

def read():
    file = pyarrow.PythonFile(Slow(), mode="r")
    while True:
        file.read(10)

def gone():
    time.sleep(0.3)
    raise FileNotFoundError("it is gone")

run_main(lambda arguments: bounded(["a", "b"], [read, gone]))
"""
    )
    command = [sys.executable, str(tmp_path / "program.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert (ended.returncode, ended.stderr) == (2, "error: b: it is gone: check its name\n")


def test_a_program_of_another_s_ends_with_its_own_code_whatever_is_under_way():
    code = """
import threading, time
from r1jax.errors import IN_CLIENTS
thread = threading.Thread(target=time.sleep, args=(60,), daemon=True)
IN_CLIENTS.add(thread)
thread.start()
"""
    for end, expected in (("", 0), ("raise SystemExit(7)", 7)):
        ended = subprocess.run([sys.executable, "-c", code + end], cwd=ROOT, timeout=240)
        assert ended.returncode == expected
