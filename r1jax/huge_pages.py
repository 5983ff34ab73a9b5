"""Memory in pages of 2 MiB for what computes on a CPU; a program is started again to have them.

A step of training asks for its temporaries anew, and each page of them is a fault of its own: of 250 MiB, which is what
a step of the default run takes, 64,000 in pages of 4 KiB. Each is looked up in tables, under a hypervisor twice. The C
library asks the kernel for huge pages where its tunable says so, which it reads once, when a process starts (glibc
manual, Memory Allocation Tunables; Linux, admin-guide/mm/transhuge).
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
TUNABLE = "glibc.malloc.hugetlb"
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SINCE = (2, 35)
"""The first glibc that knows the tunable."""
AGAIN = "R1JAX_STARTED_AGAIN"
"""Environment variable with the id of a process that was started again, whatever became of the tunable."""


def start_with_huge_pages() -> None:
    """Replaces this process by the same command with huge pages, where that gives them and was not decided already.

    Where the C library or the kernel has none, or gives them unasked, or Python was not started for this command alone
    (a debugger, a notebook), nothing happens. A `GLIBC_TUNABLES` that names the tunable is left as it is: with
    `glibc.malloc.hugetlb=0` memory stays in small pages. Process id, inherited files and signals stay. Call it before
    what takes long to import.
    """
    tunables, again = with_huge_pages(os.environ.get(VARIABLE, "")), str(os.getpid())
    if tunables is None or os.environ.get(AGAIN) == again or not is_the_command(sys.orig_argv, sys.argv):
        return
    environment = os.environ | {VARIABLE: tunables, AGAIN: again}
    with contextlib.suppress(OSError):  # where a sandbox forbids it, this process goes on
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def is_the_command(started: Sequence[str], arguments: Sequence[str]) -> bool:
    """Whether Python was started for these arguments: a script or `-m r1jax`, and neither within another program.

    Args:
      started: How Python was started, `sys.orig_argv`.
      arguments: What the program was given, `sys.argv`, its own name first.

    Returns:
      False also where the program came from standard input, which cannot be read twice.
    """
    count = len(arguments)
    options, (name, *words) = list(started[1:-count]), started[-count:] or [""]
    if options[-1:] == ["-m"] and name == "r1jax":
        del options[-1]
    elif name != arguments[0] or not Path(name).is_file():
        return False
    values = [i + 1 for i, option in enumerate(options) if option in ("-X", "-W")]
    plain = all(i in values or option[:2] in ("-X", "-W") or _is_switch(option) for i, option in enumerate(options))
    return plain and words == list(arguments[1:])


def _is_switch(option: str) -> bool:
    """Whether it is letters behind a dash, of which none names another program."""
    return option[:1] == "-" and option[1:].isalpha() and not set(option) & set("cm")


def with_huge_pages(tunables: str, kernel: Path = KERNEL) -> str | None:
    """Adds huge pages to what the C library is told.

    Args:
      tunables: What it is told now, settings joined by colons.
      kernel: The file in which Linux says whether it gives huge pages.

    Returns:
      The new settings; None where they would change nothing, or the old ones say it already.
    """
    if TUNABLE in tunables or _glibc() < SINCE or not _given_when_asked(kernel):
        return None
    return ":".join(filter(None, [tunables, f"{TUNABLE}=1"]))


def _glibc() -> tuple[int, ...]:
    """Version of the C library; (0,) where it is another."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return tuple(map(int, version.split("."))) if name == "glibc" else (0,)
    except (AttributeError, ValueError, OSError):  # no such call (Windows), name (macOS) or answer (musl)
        return (0,)


def _given_when_asked(kernel: Path) -> bool:
    """Whether Linux gives huge pages to those who ask, and to no others."""
    try:
        return "[madvise]" in kernel.read_text()
    except OSError:
        return False
