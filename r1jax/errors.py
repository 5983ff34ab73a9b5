"""Errors that a user can mend: one sentence that says what, where and what to do; exit code 2."""

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk or quota can meet any write, and is none of the program's making."""


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
    sys.exit(code or 0)
