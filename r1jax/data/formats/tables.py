"""CSV: a table whose columns are typed from the whole file."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow_csv

from r1jax.data.formats.cases import CASE_ID, FileCases, file_cases
from r1jax.data.formats.cells import column_field
from r1jax.data.formats.files import list_files, read_bytes
from r1jax.data.schema import Field
from r1jax.errors import UserError, nearest

SUFFIXES = (".csv", ".tsv")
KINDS = ("number", "category", "text")


def open_table(
    path: str | Path, kinds: Mapping[str, str] | None = None, case_id: str | None = None, delimiter: str | None = None
) -> FileCases:
    """Opens a table with a header line as a source, one case a row.

    Args:
      path: The file, UTF-8.
      kinds: "number", "category" or "text" by column, where the type that the cells show is not wanted.
      case_id: Column that names the rows; without it a column `case_id`, or else the number of the row from 0 on.
      delimiter: What stands between cells; without it the first of comma, semicolon and tab that the header has.

    Returns:
      The rows, all in memory. Empty cells are missing: NaN or "".

    Raises:
      UserError: The file is no table, a named column is not there, or a cell is not what `kinds` says.
    """
    root, (name,) = _one_file(path)
    table = Table.read(root, name, delimiter)
    typed = table.typed(kinds or {})
    key = case_id or ("case_id" if "case_id" in typed else None)
    if key is None:
        ids: list[str] | pa.Array = [str(row) for row in range(table.cells.num_rows)]
    else:
        ids = table.keys(key)
        del typed[key]
    if "case_id" in typed:
        raise UserError(f"{root / name} has a column case_id beside {case_id!r}: rename it")
    return file_cases(root, [name], "csv", [(CASE_ID, ids), *typed.values()])


def _one_file(path: str | Path) -> tuple[Path, list[str]]:
    root, names = list_files(path, (*SUFFIXES, "") if Path(path).is_file() else SUFFIXES, "table")
    if len(names) > 1:
        raise UserError(f"{path} holds {len(names)} tables, {names[0]!r} and {names[1]!r} among them: name one file")
    return root, names


class Table:
    """A CSV file as strings, with what is needed to name the line of a row.

    Attributes:
      file: Where it is.
      cells: All of them as strings.
      decimal_comma: Whether 1,5 is a number: in a table that is separated by semicolons.
    """

    def __init__(self, file: Path, cells: pa.Table, text: bytes, delimiter: str) -> None:
        self.file = file
        self.cells = cells
        self.decimal_comma = delimiter == ";"
        self._text, self._delimiter = text, delimiter

    @classmethod
    def read(cls, root: Path, name: str, delimiter: str | None = None) -> "Table":
        """Reads a file.

        Args:
          root: Folder of the data set.
          name: Of the file, relative to it.
          delimiter: See `open_table`.

        Returns:
          The table; columns without a name are called column_1 and so on by their place.

        Raises:
          UserError: It is empty, not UTF-8, a line has more or fewer cells than the header, or a name is there twice.
        """
        file, text = root / name, read_bytes(root, name)
        try:
            text.decode()
        except UnicodeDecodeError as error:
            line = text.count(b"\n", 0, error.start) + 1
            raise UserError(f"line {line} of {file} is not UTF-8: save the table as UTF-8") from error
        if b"\0" in text:
            raise UserError(f"line {text[: text.index(0)].count(10) + 1} of {file} holds a zero byte: it is no table")
        text = text.removeprefix(b"\xef\xbb\xbf")
        first = text.split(b"\n", 1)[0].decode()
        mark = delimiter or next((mark for mark in ",;\t" if mark in first), ",")
        header = [cell.strip() for cell in next(csv.reader(io.StringIO(text.decode(), newline=""), delimiter=mark), [])]
        if not any(header):
            raise UserError(f"{file} is empty, or its first line is: give it a header line")
        names = [label or f"column_{place}" for place, label in enumerate(header, 1)]
        twice = next((label for label in names if names.count(label) > 1), None)
        if twice is not None:
            raise UserError(f"column {twice!r} is there twice in line 1 of {file}: rename one of them")
        return cls(file, _parse(file, text, mark, names), text, mark)

    def line(self, row: int) -> int:
        """Finds the line of a row, which may differ where cells hold line breaks or lines are empty.

        Args:
          row: From 0 on.

        Returns:
          Line in the file, where the row ends, the header's being 1.
        """
        return _line(self._text, self._delimiter, row)

    def typed(self, kinds: Mapping[str, str], names: Sequence[str] | None = None) -> dict[str, tuple[Field, pa.Array]]:
        """Finds the types of columns.

        Args:
          kinds: See `open_table`.
          names: Which; None finds those of all.

        Returns:
          Field and values by name.

        Raises:
          UserError: See `open_table`.
        """
        for name, kind in kinds.items():
            self.check(name)
            if kind not in KINDS:
                raise UserError(f"column {name!r} cannot be of kind {kind!r}: choose among {', '.join(KINDS)}")
        typed = {}
        for name in self.cells.column_names if names is None else names:
            cells = self.cells.column(name).combine_chunks()
            found = column_field(name, cells, self.decimal_comma, kinds.get(name))
            if isinstance(found, int):
                raise UserError(
                    f"column {name!r} in line {self.line(found)} of {self.file} is {cells[found].as_py()!r}: "
                    "write a number, or nothing if unknown"
                )
            typed[name] = found
        return typed

    def check(self, name: str) -> None:
        """Refuses the name of a column that is not there.

        Args:
          name: Of the column.

        Raises:
          UserError: Names the nearest.
        """
        names = self.cells.column_names
        if name not in names:
            raise UserError(f"{self.file} has no column {name!r}{nearest(name, names)}: it has {', '.join(names)}")

    def keys(self, name: str) -> pa.Array:
        """Takes a column as ids.

        Args:
          name: Of the column.

        Returns:
          Its cells without spaces around them.

        Raises:
          UserError: One is empty, or the same as one before.
        """
        self.check(name)
        ids = pc.utf8_trim_whitespace(self.cells.column(name).combine_chunks())
        seen: dict[str, int] = {}
        for row, key in enumerate(ids.to_pylist()):
            if not key:
                raise UserError(f"column {name!r} in line {self.line(row)} of {self.file} is empty: write an id")
            if key in seen:
                lines = f"lines {self.line(seen[key])} and {self.line(row)}"
                raise UserError(f"column {name!r} in {lines} of {self.file} is {key!r}: give each row its own id")
            seen[key] = row
        return ids


def _parse(file: Path, text: bytes, delimiter: str, names: list[str]) -> pa.Table:
    """Has Arrow read all cells as strings, in one block, so that it counts the rows."""
    bad: list[arrow_csv.InvalidRow] = []

    def note(row: arrow_csv.InvalidRow) -> str:
        bad.append(row)
        return "skip"

    try:
        table = arrow_csv.read_csv(
            io.BytesIO(text),
            arrow_csv.ReadOptions(use_threads=False, block_size=len(text) + 1, column_names=names),
            arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note),
            arrow_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
        )
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise UserError(f"{file} is no valid table ({error}): repair it") from error
    if text.count(b'"') % 2:  # Arrow takes a quoted cell that never ends for one that ends with the file
        try:
            for _ in csv.reader(io.StringIO(text.decode(), newline=""), delimiter=delimiter, strict=True):
                pass
        except csv.Error as error:
            raise UserError(f"{file} is cut short or has a quotation mark too many ({error}): repair it") from error
    if bad:
        line = _line(text, delimiter, bad[0].number - 2)
        wrong = f"{bad[0].actual_columns} cells but the header has {bad[0].expected_columns}"
        raise UserError(f"line {line} of {file} has {wrong}: repair it")
    return table.slice(1)  # the header, which is read as a row where the names are given


def _line(text: bytes, delimiter: str, row: int) -> int:
    reader = csv.reader(io.StringIO(text.decode(), newline=""), delimiter=delimiter)
    wanted = (reader.line_num for cells in reader if cells)
    return next(line for place, line in enumerate(wanted) if place == row + 1)
