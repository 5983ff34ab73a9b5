"""Columns of numbers and dates from CSV and Parquet files, with errors that name the row."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64
from pyarrow import csv, parquet
from pyarrow.fs import FileType

from r1jax.data.filesystem import open_filesystem
from r1jax.errors import UserError, nearest


def read_file(path: str, wanted: tuple[str, ...] = ()) -> pa.Table:
    """Reads a .csv (UTF-8, with a header) or .parquet file.

    Args:
      path: Of the file.
      wanted: Columns that it must have.

    Returns:
      All columns.

    Raises:
      UserError: There is no such file, it cannot be read, lacks a column, or has two of one name.
    """
    system, root = open_filesystem(path)
    if not is_file(path):
        raise UserError(f"{path} does not exist, or is no file: name one by --data.path (docs/records.md)")
    if not root.endswith((".csv", ".parquet")):
        raise UserError(f"{path} is no .csv or .parquet file: name one by --data.path (docs/records.md)")
    try:
        if root.endswith(".parquet"):
            table = parquet.read_table(root, filesystem=system)
        else:
            with system.open_input_stream(root) as stream:
                table = csv.read_csv(stream)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for name in table.column_names:
        if table.column_names.count(name) > 1:
            raise UserError(f"{path} has several columns {name!r}: leave one of them")
    for name in wanted:
        if name not in table.column_names:
            hint = nearest(name, table.column_names)
            raise UserError(f"{path} has no column {name!r}{hint}: it has {', '.join(table.column_names)}")
    return table


def is_file(path: str) -> bool:
    """Asks whether there is a file.

    Args:
      path: A path or URL.

    Returns:
      Whether it is there and no folder.

    Raises:
      UserError: The store does not answer.
    """
    system, root = open_filesystem(path)
    try:
        return system.get_file_info(root).type == FileType.File
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def numbers(table: pa.Table, name: str, path: str, *, low: float | None = None) -> Float64[np.ndarray, " N"]:
    """A column as numbers, all of them finite.

    Args:
      table: From `read_file`.
      name: Of the column.
      path: Of the file, for the message.
      low: The least that a number may be.

    Returns:
      One number a row.

    Raises:
      UserError: A cell is empty, no number, not finite or too low; names the first.
    """
    column = table[name].combine_chunks()
    try:
        values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowException as error:
        raise UserError(f"{path}: column {name!r} is not numbers: {error}") from None
    bad = ~np.isfinite(values) | (values < (-np.inf if low is None else low))
    if bad.any():
        row = int(bad.argmax())
        rule = "a finite number" if low is None else f"a number of at least {low:g}"
        raise UserError(f"{path}: row {row + 1}: {name} is {column[row].as_py()!r}, but it must be {rule}")
    return values


def words(table: pa.Table, name: str, path: str) -> list[str]:
    """A column of names.

    Args:
      table: From `read_file`.
      name: Of the column.
      path: Of the file, for the message.

    Returns:
      One a row, numbers in figures.

    Raises:
      UserError: A cell is empty.
    """
    found = [None if x is None else str(x) for x in table[name].to_pylist()]
    row = next((row for row, word in enumerate(found) if not word), None)
    if row is not None:
        raise UserError(f"{path}: row {row + 1}: {name} is empty, but it must be a name")
    return found


def times(table: pa.Table, name: str, path: str) -> np.ndarray:
    """A column of dates or times (of UTC where they name no zone).

    Args:
      table: From `read_file`.
      name: Of the column.
      path: Of the file, for the message.

    Returns:
      datetime64[us], one a row.

    Raises:
      UserError: A cell is empty or no time; numbers are none, as nothing says of what.
    """
    column = table[name].combine_chunks()
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py()
        raise UserError(f"{path}: row {row + 1}: {name} is empty, but it must be a time")
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        raise UserError(f"{path}: column {name!r} is numbers, but must be dates or times, such as 2015-10-01")
    try:
        zone = column.type.tz if pa.types.is_timestamp(column.type) else None
        return column.cast(pa.timestamp("us", zone)).cast(pa.int64()).to_numpy().view("datetime64[us]")
    except pa.ArrowException as error:
        raise UserError(f"{path}: column {name!r} is not times: {error}") from None
