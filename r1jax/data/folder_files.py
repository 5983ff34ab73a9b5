"""Reads the files of a case folder: `.npz` arrays and `.csv` tables become named columns (format: docs/data.md)."""

import csv
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from r1jax.errors import UserError
from r1jax.tasks.medical.schema import FINDING, RECORD_FIELDS

RECORD = {field.name: field for field in RECORD_FIELDS}
RANK = {"image": 3, "volume": 4}
AXES = {"image": "[n, H, W]", "volume": "[n, Z, Y, X]"}
PICTURES = (*RANK, "mask")
SPACINGS = ("spacing", "image_spacing", "volume_spacing")
FLAGS = ("has_image", "has_volume")
TEXTS = ("case_id", "group", "split", "text")
NAMES = frozenset((*PICTURES, *SPACINGS, *FLAGS, *TEXTS, *FINDING, *RECORD))
UNKNOWN_CELLS = frozenset(("", "nan", "na", "n/a", "none", "null"))
"""Cells of a table that say that nothing is known; case does not matter."""


@dataclass(frozen=True)
class Column:
    """One named thing per case.

    Attributes:
      label: Name in the file.
      values: One row per case.
      parts: Which file holds the rows from which row on.
      lines: Line of each row, in a table.
    """

    label: str
    values: np.ndarray
    parts: tuple[tuple[str, int], ...]
    lines: tuple[int, ...] | None = None

    def at(self, row: int) -> str:
        """Names the place of one row for an error message."""
        file, start = max((part for part in self.parts if part[1] <= row), key=lambda part: part[1])
        if self.lines is not None:
            return f"column {self.label!r} in line {self.lines[row]} of {file}"
        return f"array {self.label!r} of {file} at row {row - start}"

    def where(self) -> str:
        """Names the whole column for an error message."""
        return f"{'array' if self.lines is None else 'column'} {self.label!r} of {self.parts[0][0]}"


def bare_name(label: str) -> str | None:
    """Gives the format's name of an array or table column, or None where the format does not know it."""
    name = label.removeprefix("target.")
    name = "nodule_present" if name == "label" else name
    return name if name in NAMES else None


def read_npz(path: Path) -> tuple[dict[str, Column], list[str]]:
    """Reads the arrays that the format knows from one `.npz`, never unpickling.

    Args:
      path: The file.

    Returns:
      Columns by the format's name, and the labels that the format does not know.

    Raises:
      UserError: The file is damaged, an array holds Python objects, or shapes do not fit together.
    """
    columns: dict[str, Column] = {}
    ignored: list[str] = []
    try:
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path} is damaged, cut short or no .npz file: write or copy it again")
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                label = member.filename.removesuffix(".npy")
                name = bare_name(label)
                if name in columns:
                    raise UserError(f"{path} holds {name} twice, as {columns[name].label!r} and {label!r}: keep one")
                with archive.open(member) as file:  # opening compares the two names of a member: none is lost unseen
                    if name is None:
                        ignored.append(label)
                    else:
                        columns[name] = Column(label, _read_array(file, label, path), ((path.name, 0),))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check the file") from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({error}): write or copy it again") from error
    _check_shapes(columns, path, ignored)
    return columns, ignored


def _read_array(file: io.BufferedIOBase, label: str, path: Path) -> np.ndarray:
    """Reads one array of an archive to its end, where the checksum is compared."""
    try:
        array = np.lib.format.read_array(file, allow_pickle=False)
        file.read(1)
    except OSError:
        raise
    except Exception as error:  # damaged bytes raise nearly anything: zlib, struct, tokenizer, memory
        if "Object arrays" in str(error):
            raise UserError(f"array {label!r} of {path} holds Python objects: save it with a plain dtype") from error
        raise UserError(f"array {label!r} of {path} is damaged ({error}): write or copy the file again") from error
    return array


def _check_shapes(columns: dict[str, Column], path: Path, ignored: list[str]) -> None:
    """Refuses types and ranks that the format does not have, and arrays that disagree about the number of cases."""
    for name, column in columns.items():
        values, what = column.values, f"array {column.label!r} of {path}"
        wanted = "USiu" if name in TEXTS else "biuf"
        if values.dtype.kind not in wanted:
            kinds = "strings or whole numbers" if name in TEXTS else "numbers"
            raise UserError(f"{what} is {values.dtype}: {kinds} are needed")
        if name not in RANK:
            continue
        if values.ndim != RANK[name]:
            raise UserError(f"{what} has shape {list(values.shape)} where {AXES[name]} is needed: reshape it")
        if 0 in values.shape[1:]:
            raise UserError(f"{what} has shape {list(values.shape)}, pictures without pixels: write it again")
        if values.dtype.kind != "f" and values.dtype not in (np.uint8, np.int16):
            raise UserError(f"{what} is {values.dtype}: use uint8 (window), int16 (HU) or a float type (0..1 or HU)")
    per_case = {name: column for name, column in columns.items() if not one_row(column)}
    if not per_case:
        others = ", ".join(map(repr, ignored)) or "nothing else"
        raise UserError(
            f"{path} has none of the arrays `image`, `volume` or record fields, but {others}: name its arrays as"
            " docs/data.md says"
        )
    lead = per_case[next((name for name in RANK if name in per_case), next(iter(per_case)))]
    if lead.values.ndim == 0 or len(lead.values) == 0:
        raise UserError(f"{path} holds no cases: array {lead.label!r} has shape {list(lead.values.shape)}")
    for column in per_case.values():
        if column.values.ndim == 0 or len(column.values) != len(lead.values):
            raise UserError(
                f"array {column.label!r} of {path} has shape {list(column.values.shape)} but {lead.label!r} has"
                f" {len(lead.values)} cases: give every array one row per case"
            )


def one_row(column: Column) -> bool:
    """Tells whether a spacing is given once for all cases of its file."""
    spacing = bare_name(column.label) in SPACINGS
    return spacing and (column.values.ndim == 1 or (column.values.ndim == 2 and len(column.values) == 1))


def read_csv(path: Path) -> tuple[dict[str, Column], list[str]]:
    """Reads a table whose header names findings, record fields, `text`, `case_id`, `group` or `split`.

    Args:
      path: The file, UTF-8, separated by commas (or by semicolons or tabs where the header has no comma).

    Returns:
      Columns by the format's name (numbers as float64, NaN where the cell is empty; texts as str), unknown labels.

    Raises:
      UserError: The encoding, the number of cells, or a cell that should be a number is wrong.
    """
    header, rows = _read_cells(path)
    lines = tuple(line for line, _ in rows)
    columns: dict[str, Column] = {}
    for index, label in enumerate(header):
        name = bare_name(label)
        if name is None:
            continue
        if name in columns:
            raise UserError(f"{path} holds {name} twice, as {columns[name].label!r} and {label!r}: keep one")
        if name == "center_mm" or name in (*PICTURES, *SPACINGS):
            raise UserError(f"column {label!r} of {path} does not fit a table: give it as an array of the .npz file")
        cells = [row[index].strip() for _, row in rows]
        values = np.array(cells, dtype=str) if name in TEXTS else _numbers(cells, label, lines, path)
        columns[name] = Column(label, values, ((path.name, 0),), lines)
    return columns, [label for label in header if bare_name(label) is None]


def _read_cells(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Reads the header and the rows with their line numbers; lines without any character are left out."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=next((mark for mark in ",;\t" if mark in first), ","), strict=True)
            header = [cell.strip() for cell in next(reader, [])]
            rows = [(reader.line_num, cells) for cells in reader if cells]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path} is no valid table ({error}): repair it") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check the file") from error
    if not any(header):
        raise UserError(f"{path} is empty: give it a header line or remove it")
    for line, cells in rows:
        if len(cells) != len(header):
            raise UserError(f"line {line} of {path} has {len(cells)} cells but its header has {len(header)}: repair it")
    return header, rows


def _numbers(cells: list[str], label: str, lines: tuple[int, ...], path: Path) -> np.ndarray:
    """Turns the cells of one column into float64, NaN where a cell says that nothing is known."""
    numbers = np.full(len(cells), np.nan)
    for row, cell in enumerate(cells):
        if cell.lower() in UNKNOWN_CELLS:
            continue
        try:
            numbers[row] = float(cell)
        except ValueError as error:
            raise UserError(
                f"column {label!r} in line {lines[row]} of {path} is {cell!r}: write a number, or nothing if unknown"
            ) from error
    return numbers
