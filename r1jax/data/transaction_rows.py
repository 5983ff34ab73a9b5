"""Payments and their outcomes as they come in, a row each: JSON lines or CSV, checked value by value."""

import csv
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

from r1jax.data.transaction_live import LiveHistory, Payment
from r1jax.data.transactions import Names
from r1jax.errors import UserError, nearest

NEEDED = ("id", "time", "customer", "terminal", "amount")


class Row(NamedTuple):
    """A payment, or the outcome of an earlier one."""

    id: str
    payment: Payment | None
    note: str
    fraud: bool | None
    """The outcome; of a payment, what is known of it already, which counts once the label delay is over."""


def take(live: LiveHistory, row: Row) -> Any:
    """Brings a history up to date.

    Args:
      live: The history.
      row: The next one.

    Returns:
      What `observe` gives for a payment, and for an outcome whether its payment is still held.

    Raises:
      UserError: The payment cannot be one; nothing was changed.
    """
    if row.payment is None:
        return live.label(row.id, bool(row.fraud))
    found = live.observe(row.payment)
    if row.fraud is not None:
        live.label(row.id, row.fraud)
    return found


def records(lines: Iterable[str]) -> Iterator[dict[str, Any] | UserError]:
    """Reads rows: JSON objects, a line each, where the first line begins with a brace, and else CSV with a header.

    Args:
      lines: Of the text, with their ends.

    Yields:
      Cells by column, or why a row is none; blank lines count as no row.

    Raises:
      UserError: The header names a column twice, or is no CSV.
    """
    lines = iter(lines)
    first = next((line for line in lines if line.strip()), None)
    if first is not None:
        first = first.removeprefix("\ufeff")  # by which some programs begin a file of UTF-8
        again = itertools.chain([first], lines)
        yield from _json(again) if first.lstrip().startswith("{") else _csv(again)


def _json(lines: Iterable[str]) -> Iterator[dict[str, Any] | UserError]:
    for line in lines:
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield UserError(f"this is no JSON ({error}): write one object a line")
            continue
        yield found if isinstance(found, dict) else UserError("this is no JSON object: write {column: value, ...}")


def _csv(lines: Iterable[str]) -> Iterator[dict[str, Any] | UserError]:
    reader = csv.reader(lines)
    try:
        header = next(reader)
    except csv.Error as error:
        raise UserError(f"the header is no CSV ({error}): end each row by a line feed") from None
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise UserError(f"the header names the column {twice!r} twice: each column needs a name of its own")
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # the reader goes on with the next line
            yield UserError(f"this is no CSV ({error}): put a note with a line break or a quote between quotes")
            continue
        if len(cells) == len(header):
            yield dict(zip(header, cells, strict=True))
        elif cells:
            yield UserError(f"it has {len(cells)} cells, but the header has {len(header)}")


def parse(record: dict[str, Any], names: Names) -> Row:
    """Checks what a row says by itself; whether it fits what came before, `take` says.

    Args:
      record: Cells by column.
      names: Of the columns.

    Returns:
      The row; one that has an id and an outcome and nothing else is the outcome of an earlier payment.

    Raises:
      UserError: A column is missing or unknown, or a value is wrong.
    """
    columns = names._asdict()
    for name in record:
        if name not in columns.values():
            raise UserError(
                f"the column {name!r} is unknown{nearest(name, columns.values())}: rows have {', '.join(names)}"
            )
    cells = {what: record.get(name) for what, name in columns.items()}
    fraud = _outcome(cells["fraud"], names.fraud)
    given = [what for what in NEEDED if cells[what] not in (None, "")]
    if given == ["id"] and fraud is not None:
        return Row(_word(cells["id"], names.id), None, "", fraud)
    lacking = [columns[what] for what in NEEDED if what not in given]
    if lacking:
        raise UserError(f"{lacking[0]} is missing: a payment has {', '.join(columns[what] for what in NEEDED)}")
    words = {what: _word(cells[what], columns[what]) for what in ("id", "customer", "terminal")}
    text = cells["text"]
    payment = Payment(
        seconds=_seconds(cells["time"], names.time), amount=_number(cells["amount"], names.amount), **words
    )
    return Row(payment.id, payment, "" if text is None else _word(text, names.text), fraud)


def _word(cell: Any, name: str) -> str:
    """A name or a note; whole numbers are names too."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    if isinstance(cell, bool) or not isinstance(cell, int | str):
        raise UserError(f"{name} is {cell!r}, but it must be a text or a whole number")
    try:
        str(cell).encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} is {cell!r}, which is not UTF-8") from None
    return str(cell)


def _number(cell: Any, name: str) -> float:
    try:
        if isinstance(cell, bool) or not isinstance(cell, int | float | str):
            raise ValueError
        return float(cell)
    except (ValueError, OverflowError):
        raise UserError(f"{name} is {cell!r}, but it must be a number") from None


def _outcome(cell: Any, name: str) -> bool | None:
    try:
        if isinstance(cell, str) and not cell.strip():
            return None
        value = cell if cell is None or isinstance(cell, bool) else _number(cell, name)
        return {None: None, 1: True, 0: False}[value]
    except (UserError, KeyError):
        raise UserError(f"{name} is {cell!r}, but it must be 1 (fraud), 0 (genuine) or empty (not known)") from None


def _seconds(cell: Any, name: str) -> int:
    """Whole seconds since 1970, as files of payments have them: a number, or a time, of UTC where it names no zone."""
    try:
        number = _number(cell, name)
    except UserError:
        number = None
    if number is not None:
        if isinstance(cell, str) and re.fullmatch(r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])", cell.strip()):
            raise UserError(f"{name} is {cell!r}, a day without a time of day: give the time of each payment")
        if not math.isfinite(number):
            raise UserError(f"{name} is {cell!r}, but it must be a number of seconds since 1970, or a time")
        return math.floor(number)
    try:
        if len(cell.strip()) <= len("2018-04-01"):
            raise ValueError
        time = datetime.fromisoformat(cell.strip())
    except (ValueError, AttributeError):
        raise UserError(f"{name} is {cell!r}, but it must be a time such as 2018-04-01 13:30:00") from None
    return math.floor((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp())
