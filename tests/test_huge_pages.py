"""Huge pages: what the C library is told, and a command that starts again as the same process."""

import os
import subprocess
import sys

import pytest

from r1jax.huge_pages import KERNEL, TUNABLE, VARIABLE, with_huge_pages

GIVEN = with_huge_pages("") is not None  # by this machine
PROGRAM = """
from r1jax.huge_pages import start_with_huge_pages

if __name__ == "__main__":
    start_with_huge_pages()

import ctypes, os, sys
from pathlib import Path

allocate, size = ctypes.CDLL(None).malloc, 64 << 20
allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
ctypes.memset(allocate(size), 1, size)
pages = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
huge = int(pages["AnonHugePages"].split()[0]) >> 10
print(os.getpid(), huge, sys.flags.optimize, os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:], sep="|")
"""


@pytest.fixture
def kernel(tmp_path):
    def says(words):
        (tmp_path / "enabled").write_text(words)
        return tmp_path / "enabled"

    return says


@pytest.mark.skipif(not GIVEN, reason=f"glibc before 2.35, or {KERNEL} gives huge pages to nobody or to all")
@pytest.mark.parametrize(
    ("told", "after"),
    [
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.arena_max=2", "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", None),
        ("glibc.malloc.hugetlb=1:glibc.malloc.arena_max=2", None),
    ],
)
def test_what_the_library_is_told_is_kept(told, after, kernel):
    assert with_huge_pages(told, kernel("always [madvise] never\n")) == after


@pytest.mark.parametrize("words", ["[always] madvise never\n", "always madvise [never]\n", ""])
def test_nothing_is_asked_of_a_kernel_that_gives_to_all_or_to_nobody(words, kernel, tmp_path):
    assert with_huge_pages("", kernel(words)) is None
    assert with_huge_pages("", tmp_path / "absent") is None


@pytest.mark.parametrize("version", ["glibc 2.34", "musl 1.2", None, "glibc unknown"])
def test_nothing_is_asked_of_another_library(version, kernel, monkeypatch):
    monkeypatch.setattr(os, "confstr", lambda name: version)
    assert with_huge_pages("", kernel("always [madvise] never\n")) is None


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="no Linux, or one that hides its pages")
@pytest.mark.parametrize("told", [None, "glibc.malloc.hugetlb=0"])
def test_a_program_starts_again_as_the_same_process_with_huge_pages(told, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)} | ({VARIABLE: told} if told else {})
    call = [sys.executable, "-O", str(script), "two words", "--flag"]
    with subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, text=True) as process:
        pid, huge, optimized, tunables, *words = process.communicate(timeout=120)[0].strip().split("|")
    assert (int(pid), optimized, words, process.returncode) == (process.pid, "1", ["two words", "--flag"], 0)
    if told or not GIVEN:
        assert tunables == str(told) and int(huge) < 32
    else:
        assert tunables == f"{TUNABLE}=1" and int(huge) >= 32
