"""How far a file of cases is: a line on stderr now and then."""

import sys
import time
from collections.abc import Iterator

INTERVAL_S = 10.0


def counted(what: str, total: int) -> Iterator[int]:
    """Gives row numbers, and says on stderr from time to time how many are done.

    Args:
      what: Of which there are so many, such as payments.
      total: All of them.

    Yields:
      0 to `total` - 1.
    """
    began = spoke = time.monotonic()
    for row in range(total):
        now = time.monotonic()
        if now - spoke >= INTERVAL_S:
            spoke, left = now, (now - began) * (total - row) / row
            print(f"{what} {row}/{total}, about {left:.0f} s to go", file=sys.stderr, flush=True)
        yield row
