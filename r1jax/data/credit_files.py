"""Card clients of a bank: six months of repayment, bills and payments, and whether the next payment is missed.

The public set "default of credit card clients" (Yeh and Lien 2009, UCI 350) and files with its columns.
"""

import numpy as np
import pyarrow as pa
from jaxtyping import Float64

from r1jax.data.record_files import numbers, read_file
from r1jax.data.records import UNKNOWN, Records
from r1jax.errors import UserError

MONTHS = 6
LABELS = ("Y", "default payment next month", "default.payment.next.month")
SPELLINGS = (
    {"limit": "X1", "education": "X3", "age": "X5"}
    | {f"{what}{m}": f"X{first + m}" for what, first in (("status", 6), ("bill", 12), ("paid", 18)) for m in range(6)},
    {"limit": "LIMIT_BAL", "education": "EDUCATION", "age": "AGE", "status0": "PAY_0"}
    | {f"status{m}": f"PAY_{m + 1}" for m in range(1, 6)}
    | {f"{what}{m}": f"{name}{m + 1}" for what, name in (("bill", "BILL_AMT"), ("paid", "PAY_AMT")) for m in range(6)},
)
"""Names of the columns; month 0 is the latest. Sex and marital status are not read: no score may rest on them."""


def read_credit(path: str) -> Records:
    """Reads a file of clients, one a row.

    Args:
      path: A .csv or .parquet file with the columns X1 to X23 or those of the UCI's sheet; `ID` and the label may be
        absent.

    Returns:
      Class 1 is a missed payment. One stream of six months, the latest last; 20 numbers.

    Raises:
      UserError: A column is missing, or a cell is wrong; names the row.
    """
    table = read_file(path)
    names = next((spelling for spelling in SPELLINGS if spelling["limit"] in table.column_names), SPELLINGS[0])
    missing = [name for name in names.values() if name not in table.column_names]
    if missing:
        raise UserError(
            f"{path} has no column {missing[0]!r}: it needs X1, X3 and X5 to X23, or the names of the UCI's "
            "sheet such as LIMIT_BAL (docs/records.md)"
        )
    read = {what: numbers(table, name, path, low=_least(what)) for what, name in names.items()}
    months = {
        what: np.stack([read[f"{what}{m}"] for m in reversed(range(MONTHS))], axis=1)
        for what in ("status", "bill", "paid")
    }
    limit = read["limit"][:, None]
    return Records(
        ids=_ids(table, path),
        label=_labels(table, path),
        table=_table(read, limit, **months),
        series=_series(limit, **months),
    )


def _least(what: str) -> float | None:
    """The least that a column may hold: limits divide, and payments are not negative; bills may be."""
    return {"limit": 1.0, "age": 0.0}.get(what, 0.0 if what.startswith("paid") else None)


def _series(limit: np.ndarray, status: np.ndarray, bill: np.ndarray, paid: np.ndarray) -> np.ndarray:
    """Status, share of the limit that is owed, share of the bill that is paid, and both amounts, of each month."""
    channels = [status, 3 * _share(bill, limit) - 1.5, 3 * _paid(paid, bill) - 1.5, _money(paid), _money(bill)]
    return np.stack(channels, axis=-1)[:, None].astype(np.float32)


def _table(
    read: dict[str, np.ndarray], limit: np.ndarray, status: np.ndarray, bill: np.ndarray, paid: np.ndarray
) -> np.ndarray:
    """The client, months late, worst and mean status, the latest states, and how much is owed and paid."""
    used, share = _share(bill, limit), _paid(paid, bill)
    late, education = np.maximum(status, 0), read["education"]
    columns = [
        _money(read["limit"]) - 1,
        (read["age"] - 35) / 10,
        *((education == level).astype(np.float64) for level in (1, 2, 3)),
        status.max(axis=1) / 2,
        status.mean(axis=1),
        (late > 0).sum(axis=1) / 2,
        late.sum(axis=1) / 4,
        *(status[:, -1 - m] for m in range(3)),
        used[:, -1],
        used.mean(axis=1),
        used[:, -1] - used[:, 0],
        share[:, -1],
        share.mean(axis=1),
        _money(paid[:, -1]),
        _money(paid.sum(axis=1)) - 1,
        _money(bill[:, -1]),
    ]
    return np.stack(columns, axis=1).astype(np.float32)


def _share(bill: np.ndarray, limit: np.ndarray) -> np.ndarray:
    return np.clip(bill / limit, -1, 2)


def _paid(paid: np.ndarray, bill: np.ndarray) -> np.ndarray:
    """Share of the month's bill that was paid, at most all of it; 1 where nothing is owed."""
    return np.where(bill > 0, np.clip(paid / np.maximum(bill, 1), 0, 1), 1.0)


def _money(amount: np.ndarray) -> Float64[np.ndarray, "..."]:
    """Logarithm, -3 at nothing (and at a credit balance) and 1 at 10,000."""
    return np.log1p(np.maximum(amount, 0) / 10) * 0.58 - 3


def _labels(table: pa.Table, path: str) -> np.ndarray:
    name = next((name for name in LABELS if name in table.column_names), None)
    if name is None:
        return np.full(len(table), UNKNOWN, np.int32)
    values = numbers(table, name, path)
    bad = (values != 0) & (values != 1)
    if bad.any():
        row = int(bad.argmax())
        raise UserError(f"{path}: row {row + 1}: {name} is {values[row]:g}, but it must be 0 or 1")
    return values.astype(np.int32)


def _ids(table: pa.Table, path: str) -> list[str]:
    """The column ID, or the number of the row."""
    if "ID" not in table.column_names:
        return [str(row + 1) for row in range(len(table))]
    ids = [str(name) for name in table["ID"].to_pylist()]
    first: dict[str, int] = {}
    for row, name in enumerate(ids):
        if first.setdefault(name, row) != row:
            raise UserError(
                f"{path}: rows {first[name] + 1} and {row + 1} both have the ID {name!r}: each needs its own"
            )
    return ids
