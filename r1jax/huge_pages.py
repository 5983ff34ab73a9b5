"""Memory in pages of 2 MiB for what computes on a CPU; a program is started again to have them.

A step of training asks for its temporaries anew. In pages of 4 KiB each of some ten thousand is a fault of its own, and
each is looked up on its way through the processor's tables, under a hypervisor twice. The C library asks the kernel for
huge pages where its tunable says so, which it reads once, when a process starts (glibc manual, Memory Allocation
Tunables; Linux, admin-guide/mm/transhuge).
"""

import os
import sys
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
TUNABLE = "glibc.malloc.hugetlb"
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SINCE = (2, 35)
"""The first glibc that knows the tunable."""


def start_with_huge_pages() -> None:
    """Replaces this process by the same command with huge pages, where that gives them and was not decided already.

    Where the C library or the kernel has none, or gives them unasked, nothing happens. A `GLIBC_TUNABLES` that names
    the tunable is left as it is: with `glibc.malloc.hugetlb=0` memory stays in small pages. Process id, files and
    signals stay. Call it before what takes long to import.
    """
    tunables = with_huge_pages(os.environ.get(VARIABLE, ""))
    if tunables is None or not sys.executable:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {VARIABLE: tunables})


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
