"""Huge pages: what the C library is told, and a command that starts again as the same process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1jax import huge_pages
from r1jax.huge_pages import AGAIN, KERNEL, TUNABLE, VARIABLE, is_the_command, with_huge_pages

GIVEN = with_huge_pages("") is not None  # by this machine
ASKED = f"{TUNABLE}=1" if GIVEN else None
PROGRAM = """
from r1jax.huge_pages import start_with_huge_pages

if __name__ == "__main__":
    start_with_huge_pages()

import ctypes, os, sys
from pathlib import Path

allocate, size = ctypes.CDLL(None).malloc, 64 << 20
allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
ctypes.memset(allocate(size), 1, size)
asked = any(line.startswith("VmFlags") and " hg" in line for line in Path("/proc/self/smaps").read_text().splitlines())
print(os.getpid(), asked, sys.flags.optimize, os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:], sep="|")
"""


@pytest.fixture
def kernel(tmp_path):
    def says(words):
        (tmp_path / "enabled").write_text(words)
        return tmp_path / "enabled"

    return says


@pytest.fixture
def program(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    return script


def environment(told=None):
    kept = {k: v for k, v in os.environ.items() if k not in (VARIABLE, AGAIN)}
    return kept | {"PYTHONPATH": os.pathsep.join(sys.path)} | ({VARIABLE: told} if told else {})


@pytest.mark.parametrize(
    ("told", "after"),
    [
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.arena_max=2", "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", None),
        ("glibc.malloc.hugetlb=1:glibc.malloc.arena_max=2", None),
    ],
)
def test_what_the_library_is_told_is_kept(told, after, kernel, monkeypatch):
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36")
    assert with_huge_pages(told, kernel("always [madvise] never\n")) == after


@pytest.mark.parametrize("words", ["[always] madvise never\n", "always madvise [never]\n", ""])
def test_nothing_is_asked_of_a_kernel_that_gives_to_all_or_to_nobody(words, kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36")
    assert with_huge_pages("", kernel(words)) is None
    assert with_huge_pages("", tmp_path / "absent") is None


@pytest.mark.parametrize("version", ["glibc 2.34", "musl 1.2", None, "glibc unknown"])
def test_nothing_is_asked_of_another_library(version, kernel, monkeypatch):
    monkeypatch.setattr(os, "confstr", lambda name: version)
    assert with_huge_pages("", kernel("always [madvise] never\n")) is None


@pytest.mark.parametrize(
    ("options", "is_command"),
    [
        ([], True),
        (["-O", "-u", "-X", "dev", "-Wignore", "-I"], True),
        (["-m", "pdb"], False),
        (["-mpdb"], False),
        (["-Im", "pdb"], False),
        (["/usr/bin/ipython"], False),
        (["-m", "coverage", "run"], False),
    ],
)
def test_a_program_within_another_is_not_started_again(options, is_command, program):
    script = str(program)
    assert is_the_command(["python", *options, script, "--a", "b"], [script, "--a", "b"]) is is_command
    assert is_the_command(["python", *options, "-m", "r1jax", "x"], ["/lib/r1jax/__main__.py", "x"]) is is_command


def test_only_what_can_be_read_again_is_started_again(program):
    assert not is_the_command(["python", "-"], ["-"])
    assert not is_the_command(["python"], [""])
    assert not is_the_command(["python", "-c", "pass"], ["-c"])
    assert not is_the_command(["jupyter", "kernel.json"], [str(program)])
    assert not is_the_command(["python", "-m", "other", "x"], ["/lib/other/__main__.py", "x"])


@pytest.mark.parametrize("reason", ["forbidden", "again"])
def test_a_process_goes_on_where_it_cannot_or_need_not_start_again(reason, monkeypatch, program):
    tried = []

    def execve(*arguments):
        tried.append(arguments)
        raise PermissionError

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(huge_pages, "with_huge_pages", lambda tunables: f"{TUNABLE}=1")
    monkeypatch.setattr(sys, "orig_argv", ["python", str(program)])
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.setenv(AGAIN, str(os.getpid()) if reason == "again" else "1")
    huge_pages.start_with_huge_pages()
    assert len(tried) == (reason == "forbidden")


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="no Linux, or one that hides its pages")
@pytest.mark.parametrize("told", [None, "glibc.malloc.hugetlb=0"])
def test_a_program_starts_again_as_the_same_process_with_huge_pages(told, program):
    call = [sys.executable, "-O", str(program), "two words", "--flag"]
    with subprocess.Popen(call, env=environment(told), stdout=subprocess.PIPE, text=True) as process:
        pid, asked, optimized, tunables, *words = process.communicate(timeout=120)[0].strip().split("|")
    assert (int(pid), optimized, words, process.returncode) == (process.pid, "1", ["two words", "--flag"], 0)
    assert tunables == str(told or ASKED) and (asked == "True") is (GIVEN and not told), KERNEL.read_text()


def test_from_standard_input_a_program_runs_once(program):
    done = subprocess.run(
        [sys.executable, "-"], input=PROGRAM, env=environment(), capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split("|")[3].strip() == "None"


@pytest.mark.parametrize(
    "command", [["train.py", "--print-config", "--config", "configs/medical.py:smoke"], ["-m", "r1jax"]]
)
def test_commands_start_again_once(command, tmp_path):
    noted = tmp_path / "noted"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nopen({str(noted)!r}, 'a').write(os.environ.get({VARIABLE!r}, 'small') + '\\n')\n"
    )
    root = Path(__file__).resolve().parents[1]
    told = environment() | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
    done = subprocess.run([sys.executable, *command], cwd=root, env=told, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout
    assert noted.read_text().split() == ["small", *([ASKED] if GIVEN else [])]
