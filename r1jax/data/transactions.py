"""A stream of payments in time order, column by column, and the checks that every later step relies on."""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float32, Int8, Int32, Int64

from r1jax.errors import UserError

DAY = 86400
LONGEST = 2**31
"""Amounts from here on cannot be counted in parts of a cent over many rows."""
SPAN = (-2_208_988_800, 7_258_118_400)
"""Seconds from 1900 to before 2200, in which times must lie: milliseconds since 1970 do not."""
HORIZON = 180 * DAY
"""Payments that are older are not looked back at, so that nobody has to remember who has been silent for longer."""
UNITS = 10_000
"""Parts of a unit of money that sums are counted in: whole numbers add up to the same in any order."""

VISIBLE = r"[^\s\pZ\p{Cc}\x{fffe}\x{ffff}]"
"""A character (RE2) that a name can be told by: neither a space nor a control character."""


class Names(NamedTuple):
    """What the columns are called, for messages."""

    id: str = "TRANSACTION_ID"
    time: str = "TX_DATETIME"
    customer: str = "CUSTOMER_ID"
    terminal: str = "TERMINAL_ID"
    amount: str = "TX_AMOUNT"
    fraud: str = "TX_FRAUD"
    scenario: str = "TX_FRAUD_SCENARIO"
    text: str = "TX_TEXT"


@dataclass(frozen=True, eq=False)
class Transactions:
    """N payments in time order; those of one second keep the order in which they came.

    Attributes:
      ids: Name of each, unique.
      seconds: Time since the epoch (UTC).
      customer: Who pays, as an index into `customers`.
      terminal: Where, as an index into `terminals`.
      amount: Money, not negative.
      fraud: 1, 0, or NaN where nobody knows.
      scenario: Kind of fraud (0 is genuine) of simulated data, never an input; None where there is none.
      text: A note on each, "" where there is none; None where no payment has one.
      customers: Names of the customers.
      terminals: Names of the terminals.
      shown: Of generated payments, what gives a fraud away by itself: 1 its amount, 2 its note, 3 both; None otherwise.
    """

    ids: pa.Array
    seconds: Int64[np.ndarray, " N"]
    customer: Int32[np.ndarray, " N"]
    terminal: Int32[np.ndarray, " N"]
    amount: Float32[np.ndarray, " N"]
    fraud: Float32[np.ndarray, " N"]
    scenario: Int8[np.ndarray, " N"] | None
    text: pa.Array | None
    customers: pa.Array
    terminals: pa.Array
    shown: Int8[np.ndarray, " N"] | None = None

    def __len__(self) -> int:
        """Number of payments."""
        return len(self.seconds)

    @property
    def money(self) -> Int64[np.ndarray, " N"]:
        """Amounts in 1 / `UNITS`."""
        return np.rint(self.amount.astype(np.float64) * UNITS).astype(np.int64)

    def digest(self) -> str:
        """sha256 (hex) over all that a model or a figure can depend on."""
        made = hashlib.sha256()
        for item in dataclasses.fields(self):
            column = getattr(self, item.name)
            made.update(item.name.encode())
            if isinstance(column, np.ndarray):
                made.update(np.ascontiguousarray(column).tobytes())
            elif column is not None:
                for buffer in pa.concat_arrays([column]).buffers()[1:]:
                    made.update(b"" if buffer is None else buffer)
        return made.hexdigest()


def check(table: Transactions, where: str, names: Names = Names()) -> Transactions:  # noqa: B008
    """Refuses what is no stream of payments.

    Args:
      table: Any columns of one length.
      where: The file or source, for messages.
      names: Of its columns.

    Returns:
      The same.

    Raises:
      UserError: Names the first row that is wrong, counted from 1, and its value.
    """

    def refuse(wrong: Bool[np.ndarray, " N"], name: str, value: Callable[[int], object], why: str) -> None:
        if wrong.any():
            row = int(wrong.argmax())
            raise UserError(f"{where}: row {row + 1}: {name} is {value(row)!r}, but {why}")

    if not len(table):
        raise UserError(f"{where}: there is no transaction in it: give a file with at least one row")
    time = lambda row: str(np.datetime64(int(table.seconds[row]), "s"))  # noqa: E731
    back = np.append(False, np.diff(table.seconds) < 0)
    row = int(back.argmax())
    why = f"the row above is at {time(row - 1)}: the clock goes backwards; sort the rows by {names.time}"
    refuse(back, names.time, time, why)
    outside = (table.seconds < SPAN[0]) | (table.seconds >= SPAN[1])
    why = "times must lie from 1900 to 2199; numbers are seconds since 1970, not milliseconds or microseconds"
    refuse(outside, names.time, lambda row: int(table.seconds[row]), why)
    whole = np.arange(len(table))
    for name, column, codes in (
        (names.id, table.ids, whole),
        (names.customer, table.customers, table.customer),
        (names.terminal, table.terminals, table.terminal),
    ):
        shown = pc.match_substring_regex(column, VISIBLE).to_numpy(zero_copy_only=False)
        refuse(~shown[codes], name, lambda row, c=column, i=codes: c[int(i[row])].as_py(), "it must not be empty")
    coded = table.ids.dictionary_encode().indices.to_numpy()
    again = np.ones(len(table), bool)
    again[np.unique(coded, return_index=True)[1]] = False
    refuse(again, names.id, lambda row: table.ids[row].as_py(), "a row above has that name: each needs its own")
    amount, fraud = (lambda row: float(table.amount[row])), (lambda row: float(table.fraud[row]))
    refuse(~np.isfinite(table.amount), names.amount, amount, "it must be a finite number")
    refuse(table.amount < 0, names.amount, amount, "it must not be negative: leave refunds out")
    refuse(table.amount > LONGEST, names.amount, amount, f"it must be below {LONGEST}")
    odd = ~(np.isnan(table.fraud) | (table.fraud == 0) | (table.fraud == 1))
    refuse(odd, names.fraud, fraud, "it must be 1 (fraud), 0 (genuine) or empty (not known)")
    return table


def joined(earlier: Transactions, later: Transactions, where: str, names: Names = Names()) -> Transactions:  # noqa: B008
    """Puts a later stream behind an earlier one, with one list of customers and one of terminals.

    Args:
      earlier: From `check`.
      later: From `check`.
      where: Name of the later one, for messages.
      names: Of the columns.

    Returns:
      All rows.

    Raises:
      UserError: The later stream begins before the earlier one ends, or repeats one of its transactions.
    """
    last, first = int(earlier.seconds[-1]), int(later.seconds[0])
    if first < last:
        raise UserError(
            f"{where} begins at {np.datetime64(first, 's')}, before its history ends at {np.datetime64(last, 's')}: "
            "give as history only what came before"
        )

    coded = pa.concat_arrays([earlier.ids, later.ids]).dictionary_encode().indices.to_numpy()
    again = np.isin(coded[len(earlier) :], coded[: len(earlier)])
    if again.any():
        row = int(again.argmax())
        raise UserError(
            f"{where}: row {row + 1}: {names.id} is {later.ids[row].as_py()!r}, but its history has that name: each "
            "transaction needs its own"
        )

    def codes(a: tuple[pa.Array, np.ndarray], b: tuple[pa.Array, np.ndarray]) -> tuple[np.ndarray, pa.Array]:
        found = pa.concat_arrays([a[0], b[0]]).dictionary_encode()
        where = found.indices.to_numpy()
        return np.concatenate([where[a[1]], where[len(a[0]) :][b[1]]]), found.dictionary

    def text(table: Transactions) -> pa.Array:
        return pa.array([""] * len(table), pa.string()) if table.text is None else table.text

    customer, customers = codes((earlier.customers, earlier.customer), (later.customers, later.customer))
    terminal, terminals = codes((earlier.terminals, earlier.terminal), (later.terminals, later.terminal))
    scenario = None
    if earlier.scenario is not None and later.scenario is not None:
        scenario = np.concatenate([earlier.scenario, later.scenario])
    written = earlier.text is not None or later.text is not None
    return Transactions(
        ids=pa.concat_arrays([earlier.ids, later.ids]),
        seconds=np.concatenate([earlier.seconds, later.seconds]),
        customer=customer,
        terminal=terminal,
        amount=np.concatenate([earlier.amount, later.amount]),
        fraud=np.concatenate([earlier.fraud, later.fraud]),
        scenario=scenario,
        text=pa.concat_arrays([text(earlier), text(later)]) if written else None,
        customers=customers,
        terminals=terminals,
    )
