"""Errors that a user can mend: one sentence that says what, where and what to do; exit code 2."""

import atexit
import contextlib
import difflib
import errno
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk or quota can meet any write, and is none of the program's making."""

IN_CLIENTS: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
"""Daemon threads that may still be in a client's native code when the program ends."""
_ending: dict[str, int] = {}
"""The exit code that `run_main` has come to; empty in a program of another's, whose code is not known here."""


class UserError(Exception):
    """Bad input (flag, file, checkpoint, hardware); its message is shown without a traceback."""


def nearest(name: str, options: Iterable[str], cutoff: float = 0.5) -> str:
    """Names the closest option for an error message.

    Args:
      name: What the user wrote.
      options: What would have been accepted.
      cutoff: Least similarity worth naming, from 0 to 1 (difflib's ratio).

    Returns:
      ` (did you mean 'x'?)`, or the empty string where nothing is close.
    """
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=cutoff)
    return f" (did you mean {close[0]!r}?)" if close else ""


def run_main(main: Callable[[list[str]], int | None]) -> None:
    """Runs a command and leaves with its exit code; bad input is one line on stderr and code 2.

    Args:
      main: Takes the arguments after the program's name, returns the exit code (None is 0).
    """
    _ending["code"] = 1  # of an error that passes through
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130  # 128 + SIGINT, as a shell reports it
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails once more
        code = 141  # 128 + SIGPIPE: the reader (`| head`) left
    except OSError as error:
        if error.errno not in FULL:
            raise
        print(f"error: {error}: make room, and run the same command again", file=sys.stderr)
        code = 2
    _ending["code"] = code or 0
    sys.exit(_ending["code"])


@atexit.register
def _leave_clients() -> None:
    """Ends the program at once where a client still works: Python would stop that thread inside its C++, and abort."""
    if _ending and any(thread.is_alive() for thread in IN_CLIENTS):
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(_ending["code"])
