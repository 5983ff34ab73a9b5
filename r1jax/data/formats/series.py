"""Series: CSV files of sensors, one file a unit (a run, a machine, a patient), or one file with a column of units."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float

from r1jax.data.formats.cases import CASE_ID, FileCases, file_cases
from r1jax.data.formats.files import list_files
from r1jax.data.formats.tables import SUFFIXES, Table
from r1jax.data.schema import Field
from r1jax.errors import UserError

UNITS = ("unit", "case_id")
"""Names of the column of units that need not be said."""
EXACT = 2**24
"""float32 holds whole numbers up to here."""


def open_series(
    path: str | Path,
    unit: str | None = None,
    time: str | None = None,
    channels: Sequence[str] | None = None,
    labels: Sequence[str] = (),
) -> FileCases:
    """Opens sensor series as a source, one case a unit.

    Args:
      path: A folder with one file a unit, or one file.
      unit: Column that says which unit a row is of, in one file; without it `unit` or `case_id`.
      time: Column of times: numbers, or dates such as 2024-03-01 12:00:00 (in seconds since 1970, UTC if no zone is
        given). Rows are put in their order.
      channels: Columns to read; without it all others, which then must be numbers.
      labels: Columns that are the same in all rows of a unit: columns of the case (of one file only).

    Returns:
      `series` float32 [T, C], NaN where missing; `channels["series"]` of the source names its C columns. `time`
      float64 [T] if asked for, and the labels.

    Raises:
      UserError: A column is not there, is no number, or loses digits as float32; two rows of a unit have one time; a
        label differs within a unit; or files have different columns.
    """
    root, names = list_files(path, (*SUFFIXES, "") if Path(path).is_file() else SUFFIXES, "table")
    first = Table.read(root, names[0])
    if Path(path).is_file():
        unit = unit or next((name for name in UNITS if name in first.cells.column_names), None)
        if unit is None:
            raise UserError(
                f"{first.file} has no column {' or '.join(UNITS)}: name the column of units in unit, or give a folder "
                "with one file a unit"
            )
        return _one_file(root, names[0], first, unit, time, channels, labels)
    if unit is not None or labels:
        raise UserError(f"{path} is a folder, one file a unit: columns of units and labels are read from one file only")
    chosen = _channels(first, (time,), channels)
    read = functools.partial(_read_file, root, tuple(names), time, chosen)
    rest = [Field("series", "series", "float32", (None, len(chosen))), *_time_field(time)]
    return file_cases(
        root,
        names,
        "series" if time is None else f"series by {time}",
        [(CASE_ID, names)],
        rest,
        read,
        {"series": chosen},
    )


def _time_field(time: str | None) -> list[Field]:
    return [] if time is None else [Field("time", "series", "float64", (None,))]


def _channels(table: Table, others: Sequence[str | None], channels: Sequence[str] | None) -> tuple[str, ...]:
    """Chooses the columns of the series."""
    for name in (*(channels or ()), *(name for name in others if name is not None)):
        table.check(name)
    chosen = tuple(channels or (name for name in table.cells.column_names if name not in others))
    if not chosen:
        raise UserError(f"{table.file} has no column of a sensor: it has {', '.join(table.cells.column_names)}")
    return chosen


def _one_file(
    root: Path,
    name: str,
    table: Table,
    unit: str,
    time: str | None,
    channels: Sequence[str] | None,
    labels: Sequence[str],
) -> FileCases:
    """Cuts one file by its column of units, in the order in which they first come."""
    chosen = _channels(table, (unit, time, *labels), channels)
    units = pc.utf8_trim_whitespace(table.cells.column(unit).combine_chunks())
    empty = pc.index(units, "").as_py()
    if empty >= 0:
        raise UserError(f"column {unit!r} in line {table.line(empty)} of {table.file} is empty: write the unit")
    codes = units.dictionary_encode()
    place = codes.indices.to_numpy()
    values, times = _values(table, chosen), None if time is None else _times(table, time)
    order = np.lexsort((np.arange(len(place)) if times is None else times, place))
    if times is not None:
        _check_times(table, times, place, order)
    starts = np.searchsorted(place[order], np.arange(len(codes.dictionary) + 1))
    known = [(CASE_ID, codes.dictionary), *_labels(table, labels, place, order[starts[:-1]])]
    read = functools.partial(_read_rows, values[order], None if times is None else times[order], starts)
    rest = [Field("series", "series", "float32", (None, len(chosen))), *_time_field(time)]
    what = f"series of each {unit}" + ("" if time is None else f" by {time}")
    return file_cases(root, [name], what, known, rest, read, {"series": chosen})


def _values(table: Table, chosen: Sequence[str]) -> Float[np.ndarray, "rows C"]:
    """Reads columns as float32, and refuses whole numbers that it cannot hold."""
    kinds = dict.fromkeys(chosen, "number")
    typed = table.typed(kinds, chosen)
    columns = []
    for name in chosen:
        numbers = typed[name][1].to_numpy(zero_copy_only=False)
        with np.errstate(over="ignore"):
            small = numbers.astype(np.float32)
        lost = np.isinf(small) | ((np.abs(numbers) > EXACT) & (numbers == np.floor(numbers)) & (small != numbers))
        if lost.any():
            row = int(lost.argmax())
            where = f"column {name!r} in line {table.line(row)} of {table.file}"
            raise UserError(
                f"{where} is {numbers[row]}, which float32 cannot hold: name it in time or labels, or leave it out "
                "with channels"
            )
        columns.append(small)
    return np.stack(columns, axis=1)


def _times(table: Table, time: str) -> Float[np.ndarray, " rows"]:
    """Reads a column of times as float64."""
    cells = pc.utf8_trim_whitespace(table.cells.column(time).combine_chunks())
    for kind in (pa.timestamp("us"), pa.timestamp("us", "UTC"), pa.float64()):
        try:
            values = cells.cast(kind)
        except pa.ArrowInvalid:
            continue
        numbers = (
            values.to_numpy(zero_copy_only=False) if kind == pa.float64() else values.cast(pa.int64()).to_numpy() / 1e6
        )
        if np.isfinite(numbers).all():
            return numbers
    for row, cell in enumerate(cells.to_pylist()):
        if not _is_time(cell):
            where = f"column {time!r} in line {table.line(row)} of {table.file}"
            raise UserError(f"{where} is {cell!r}: write a number, or a date such as 2024-03-01 12:00:00")
    raise UserError(f"column {time!r} of {table.file} mixes numbers, dates and zones: write all times alike")


def _is_time(cell: str) -> bool:
    for kind in (pa.timestamp("us"), pa.timestamp("us", "UTC"), pa.float64()):
        try:
            value = pa.scalar(cell).cast(kind)
        except pa.ArrowInvalid:
            continue
        return kind != pa.float64() or bool(np.isfinite(value.as_py()))
    return False


def _check_times(table: Table, times: np.ndarray, place: np.ndarray, order: np.ndarray) -> None:
    """Refuses two rows of one unit at one time."""
    same = (np.diff(times[order]) == 0) & (np.diff(place[order]) == 0)
    if same.any():
        row = int(same.argmax())
        lines = sorted(table.line(int(order[row + k])) for k in (0, 1))
        raise UserError(f"lines {lines[0]} and {lines[1]} of {table.file} have one unit and one time: remove one")


def _labels(table: Table, labels: Sequence[str], place: np.ndarray, firsts: np.ndarray) -> list[tuple[Field, pa.Array]]:
    """Takes columns that do not change within a unit from its first row."""
    typed = table.typed({}, labels)
    found = []
    for name in labels:
        field, values = typed[name]
        codes = table.cells.column(name).combine_chunks().dictionary_encode().indices.to_numpy()
        differs = codes != codes[firsts][place]
        if differs.any():
            row = int(differs.argmax())
            where = f"column {name!r} in line {table.line(row)} of {table.file}"
            raise UserError(f"{where} differs within its unit: a label is the same in all rows, name it in channels")
        found.append((field, values.take(pa.array(firsts))))
    return found


def _read_rows(values: np.ndarray, times: np.ndarray | None, starts: np.ndarray, row: int) -> dict[str, np.ndarray]:
    part = slice(int(starts[row]), int(starts[row + 1]))
    return {"series": values[part]} | ({} if times is None else {"time": times[part]})


def _read_file(
    root: Path, names: tuple[str, ...], time: str | None, chosen: tuple[str, ...], row: int
) -> Mapping[str, Any]:
    table = Table.read(root, names[row])
    _channels(table, (time,), chosen)
    values = _values(table, chosen)
    if not len(values):
        raise UserError(f"{table.file} has no rows: remove it")
    if time is None:
        return {"series": values}
    times = _times(table, time)
    order = np.argsort(times, kind="stable")
    _check_times(table, times, np.zeros(len(times), int), order)
    return {"series": values[order], "time": times[order]}
