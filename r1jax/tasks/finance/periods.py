"""Which payments are learned from, validated on and tested on: periods of time, never a random part."""

from datetime import UTC, datetime

import numpy as np
from jaxtyping import Int64

from r1jax.config import FinanceConfig
from r1jax.data.transactions import DAY
from r1jax.errors import UserError

SHARES = {"train": (0.3, 0.8), "val": (0.8, 0.87), "test": (0.87, 1.0)}
"""Of the days, where none are named; the last days before validation are not learned from, as their labels are not
known when it begins. No such gap lies before the test, though validation sets the thresholds (docs/finance.md)."""


def period_rows(seconds: Int64[np.ndarray, " N"], split: str, config: FinanceConfig) -> Int64[np.ndarray, " B"]:
    """Rows of a part.

    Args:
      seconds: Of all payments, ascending.
      split: `train`, `val`, `test` or `all`.
      config: Periods, and the label delay.

    Returns:
      The rows, ascending.

    Raises:
      UserError: A period is malformed, has no payment, or begins before the one before it ends.
    """
    if split == "all":
        return np.arange(len(seconds))
    begin, end = _period(seconds, split, config)
    _check_order(seconds, config)
    first, last = np.searchsorted(seconds, [begin, end])
    if first >= last:
        have = f"{_day(int(seconds[0]))} to {_day(int(seconds[-1]))}"
        raise UserError(
            f"no transaction is in the {split} period, from {_day(begin)} to before {_day(end)}: the data covers "
            f"{have}; name another period by --task.finance.{split} FIRST_DAY DAY_AFTER_THE_LAST"
        )
    return np.arange(first, last)


def _period(seconds: Int64[np.ndarray, " N"], split: str, config: FinanceConfig) -> tuple[int, int]:
    """First second of a part, and the one after its last."""
    named = getattr(config, split)
    return _named(split, named) if named else _shared(seconds, split, config)


def _check_order(seconds: Int64[np.ndarray, " N"], config: FinanceConfig) -> None:
    """Raises UserError where parts overlap, which only those that are named can do."""
    parts = ("train", "val", "test")
    for one, other in zip(parts[:-1], parts[1:], strict=True):
        end, begin = _period(seconds, one, config)[1], _period(seconds, other, config)[0]
        if begin < end:
            how = {name: "named" if getattr(config, name) else "chosen by shares" for name in (one, other)}
            raise UserError(
                f"task.finance.{one} ({how[one]}) ends before {_day(end)}, but task.finance.{other} ({how[other]}) "
                f"begins on {_day(begin)}: periods must follow each other without overlap; name both"
            )


def _named(split: str, days: tuple[str, ...]) -> tuple[int, int]:
    try:
        given = (datetime.fromisoformat(day) for day in days)
        begin, end = (int((day if day.tzinfo else day.replace(tzinfo=UTC)).timestamp()) for day in given)
    except ValueError:
        raise UserError(
            f"task.finance.{split} is {' '.join(days)!r}, but it must be two days such as 2018-05-08 2018-08-25: the "
            "first one and the one after the last"
        ) from None
    if end <= begin:
        raise UserError(f"task.finance.{split} is {' '.join(days)!r}: the second day must be later than the first")
    return begin, end


def _shared(seconds: Int64[np.ndarray, " N"], split: str, config: FinanceConfig) -> tuple[int, int]:
    """Whole days by `SHARES`; between learning and validation lies the label delay."""
    first = int(seconds[0]) // DAY
    days = int(seconds[-1]) // DAY + 1 - first
    begin, end = (DAY * (first + round(share * days)) for share in SHARES[split])
    return begin, end - round(config.label_delay_days * DAY) if split == "train" else end


def _day(seconds: int) -> str:
    return str(np.datetime64(seconds, "s").astype("datetime64[D]"))
