"""Reads streams of payments from CSV and Parquet files whose columns have any names."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, parquet
from pyarrow.fs import FileSelector, FileType

from r1jax.data.filesystem import open_filesystem
from r1jax.data.transactions import LONGEST, SPAN, Names, Transactions, check
from r1jax.errors import UserError, nearest

SUFFIXES = (".parquet", ".csv")
UNITS_OF_TIME = (("milliseconds", 1e3), ("microseconds", 1e6), ("nanoseconds", 1e9))
NEEDED = ("id", "time", "customer", "terminal", "amount")


def column_names(pairs: Sequence[str]) -> Names:
    """Reads `task.finance.columns`.

    Args:
      pairs: WHAT=COLUMN each, such as time=BOOKED_AT; what is not named keeps the handbook's name.

    Returns:
      The name of every column.

    Raises:
      UserError: One is no such pair, or names what there is not.
    """
    given = {}
    for pair in pairs:
        what, equals, name = pair.partition("=")
        if not equals or not name or what not in Names._fields:
            meant = nearest(what, Names._fields)
            raise UserError(
                f"task.finance.columns has {pair!r}{meant}: write WHAT=COLUMN, where WHAT is one of "
                f"{', '.join(Names._fields)}"
            )
        given[what] = name
    names = Names(**given)
    for what, name in given.items():
        other = next((other for other in Names._fields if other != what and getattr(names, other) == name), None)
        if other is not None:
            raise UserError(
                f"task.finance.columns gives {name!r} for the {what}, but it is the {other} already: name another "
                f"column for one of them"
            )
    return names


def read_transactions(path: str, columns: Sequence[str] = ()) -> Transactions:
    """Reads a file, or all files of a folder in the order of their names, and checks every row.

    Args:
      path: A .csv (UTF-8, with a header) or .parquet file, or a folder of one kind of them.
      columns: As in `column_names`.

    Returns:
      The payments.

    Raises:
      UserError: There is no such file, a column is missing, or a row is wrong; says which and how to mend it.
    """
    names = column_names(columns)
    explicit = {pair.partition("=")[0] for pair in columns}
    cells = _cells(path)
    wanted = {what: name for what, name in names._asdict().items() if what in NEEDED or what in explicit}
    for what, name in wanted.items():
        if name not in cells.column_names:
            raise UserError(
                f"{path} has no column {name!r}{nearest(name, cells.column_names)} for the {what}: it has "
                f"{', '.join(cells.column_names)}; say which it is by --task.finance.columns {what}=COLUMN"
            )

    def column(what: str) -> pa.Array | None:
        name = getattr(names, what)
        if name not in cells.column_names:
            return None
        found = cells.column(name).combine_chunks()
        return pa.concat_arrays(found.chunks) if isinstance(found, pa.ChunkedArray) else found

    customer, customers = _coded(column("customer"))
    terminal, terminals = _coded(column("terminal"))
    fraud, scenario, text = column("fraud"), column("scenario"), column("text")
    unknown = np.full(len(cells), np.nan)
    table = Transactions(
        ids=_words(column("id")),
        seconds=_seconds(column("time"), path, names.time),
        customer=customer,
        terminal=terminal,
        amount=_amounts(column("amount"), path, names.amount),
        fraud=(unknown if fraud is None else _numbers(fraud, path, names.fraud)).astype(np.float32),
        scenario=None if scenario is None else _scenarios(scenario, path, names.scenario),
        text=None if text is None else _words(text),
        customers=customers,
        terminals=terminals,
    )
    return check(table, path, names)


def _cells(path: str) -> pa.Table:
    """All columns of all files; those of a CSV as they are written."""
    system, root = open_filesystem(path)
    info = system.get_file_info(root)
    files = [info]
    if info.type == FileType.Directory:
        files = sorted(system.get_file_info(FileSelector(root)), key=lambda file: file.base_name)
    found = [file for file in files if file.type == FileType.File and file.path.endswith(SUFFIXES)]
    if not found:
        what = "is not here" if info.type == FileType.NotFound else "holds no .csv or .parquet file of transactions"
        raise UserError(f"{path} {what}: name a file or folder of transactions by --data.path (docs/finance.md)")
    tables = []
    for file in found:
        try:
            if file.path.endswith(".parquet"):
                tables.append(parquet.read_table(file.path, filesystem=system))
            else:
                with system.open_input_stream(file.path) as first, csv.open_csv(first) as reader:
                    head = reader.schema.names
                with system.open_input_stream(file.path) as stream:
                    options = csv.ConvertOptions(column_types=dict.fromkeys(head, pa.string()))
                    tables.append(csv.read_csv(stream, convert_options=options))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file.path} cannot be read: {error}") from error
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(f"{path}: its files do not fit each other: {error}") from error


def _words(column: pa.Array) -> pa.Array:
    """Any column as text, "" where a cell is empty."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_floating(column.type):
        # Whole numbers turn into floats where some cells are empty; they are the same names as without.
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
        if pc.all(pc.and_(pc.equal(pc.floor(column), column), pc.less(pc.abs(column), 2.0**53))).as_py():
            column = column.cast(pa.int64())
    return pc.fill_null(column.cast(pa.string()), "")


def _coded(column: pa.Array) -> tuple[np.ndarray, pa.Array]:
    found = _words(column).dictionary_encode()
    return found.indices.to_numpy(), found.dictionary


def _numbers(column: pa.Array, path: str, name: str) -> np.ndarray:
    """float64, NaN where a cell is empty."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        stripped = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.equal(stripped, ""), pa.scalar(None, pa.string()), stripped)
    return _cast(column, pa.float64(), path, name, "a number").to_numpy(zero_copy_only=False)


def _amounts(column: pa.Array, path: str, name: str) -> np.ndarray:
    values = _numbers(column, path, name)
    large = values >= LONGEST
    if large.any():
        row = int(large.argmax())
        raise UserError(f"{path}: row {row + 1}: {name} is {float(values[row])!r}, but it must be below {LONGEST}")
    return values.astype(np.float32)


def _scenarios(column: pa.Array, path: str, name: str) -> np.ndarray:
    """int8, 0 where a cell is empty."""
    values = np.nan_to_num(_numbers(column, path, name), posinf=-1, neginf=-1)
    odd = (values != np.floor(values)) | (values < 0) | (values > np.iinfo(np.int8).max)
    if odd.any():
        row = int(odd.argmax())
        raise UserError(
            f"{path}: row {row + 1}: {name} is {column[row].as_py()!r}, but it must be a whole number from 0 (genuine) "
            "to 127, or empty"
        )
    return values.astype(np.int8)


def _seconds(column: pa.Array, path: str, name: str) -> np.ndarray:
    """Whole seconds since the epoch, from times (of UTC where they name no zone) or numbers of seconds."""
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py()
        raise UserError(f"{path}: row {row + 1}: {name} is empty, but every transaction needs a time")
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = _read_times(pc.utf8_trim_whitespace(column), path, name)
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return _whole_seconds(_cast(column, pa.float64(), path, name, "a number of seconds").to_numpy(), path, name)
    if pa.types.is_date(column.type):
        raise UserError(f"{path}: {name} holds days without a time of day: give the time of each transaction")
    if not pa.types.is_timestamp(column.type):
        raise UserError(f"{path}: {name} is {column.type}: give times, texts of times, or seconds since the epoch")
    exact = _cast(column, pa.timestamp("us", column.type.tz), path, name, "a time from 1900 to 2199")
    ticks = exact.cast(pa.int64()).to_numpy()
    return np.floor_divide(ticks, 1_000_000)


def _read_times(column: pa.Array, path: str, name: str) -> pa.Array:
    """Texts as times of UTC, or as numbers where all of them are digits."""
    if pc.all(pc.match_substring_regex(column, r"^-?\d+(\.\d*)?$")).as_py():
        if pc.all(pc.match_substring_regex(column, r"^(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])$")).as_py():
            raise UserError(f"{path}: {name} holds days without a time of day: give the time of each transaction")
        return column.cast(pa.float64())
    zoned = pc.match_substring_regex(column, r"\d[Zz]$|[T ]\d\d[^+-]*[+-]\d\d:?(\d\d)?$")
    if not pc.any(zoned).as_py():
        return _cast(column, pa.timestamp("us"), path, name, "a time such as 2018-04-01 13:30:00")
    if not pc.all(zoned).as_py():
        row = pc.index(pc.equal(zoned, zoned[0]), False).as_py()
        names = "names a zone" if zoned[row].as_py() else "names no zone"
        raise UserError(
            f"{path}: row {row + 1}: {name} is {column[row].as_py()!r}, which {names}, unlike the rows above: give "
            "every time a zone, or none"
        )
    return _cast(column, pa.timestamp("us", "UTC"), path, name, "a time such as 2018-04-01T13:30:00Z")


def _whole_seconds(values: np.ndarray, path: str, name: str) -> np.ndarray:
    """int64; refuses what is no number, or no number of seconds."""
    odd = ~((values >= SPAN[0]) & (values < SPAN[1]))
    if odd.any():
        row = int(odd.argmax())
        unit = next((word for word, part in UNITS_OF_TIME if values[row] / part < SPAN[1]), None)
        meant = f" (are they {unit}?)" if unit and np.isfinite(values[row]) and values[row] > 0 else ""
        raise UserError(
            f"{path}: row {row + 1}: {name} is {float(values[row])!r}, but it must be a number of seconds since 1970, "
            f"from 1900 to 2199{meant}"
        )
    return np.floor(values).astype(np.int64)


def _cast(column: pa.Array, kind: pa.DataType, path: str, name: str, what: str) -> pa.Array:
    """Converts a column, or names the first cell that cannot be converted."""
    try:
        return column.cast(kind)
    except pa.ArrowException:
        for row, cell in enumerate(column):
            try:
                cell.cast(kind)
            except pa.ArrowException:
                raise UserError(f"{path}: row {row + 1}: {name} is {cell.as_py()!r}, but it must be {what}") from None
        raise
