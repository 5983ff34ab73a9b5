"""Puts the files of a case folder together into one checked set of cases (format: docs/data.md)."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int

from r1jax.data.folder_checks import (
    as_case_ids,
    as_marks,
    as_numbers,
    as_pictures,
    as_spacing,
    as_texts,
    check_mask,
    hounsfield,
)
from r1jax.data.folder_files import FLAGS, PICTURES, RANK, SPACINGS, TEXTS, Column, one_row, read_csv, read_npz
from r1jax.errors import UserError, nearest
from r1jax.tasks.medical.schema import FINDINGS, RECORD_FIELDS


@runtime_checkable
class Pictures(Protocol):
    """Pictures of all cases, in memory or read when they are asked for; safe to use from several threads.

    Attributes:
      layout: dtype and shape of one `volume`, `image` (uint8 or int16) and `mask` (plain or packed), where present.
    """

    @property
    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """See the class."""
        ...

    def read(self, rows: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        """Reads pictures.

        Args:
          rows: Of which cases, in any order.

        Returns:
          [B, ...] of each name of `layout`.
        """
        ...


@dataclass(frozen=True, eq=False)
class ArrayPictures:
    """Pictures in memory.

    Attributes:
      arrays: By name, one row per case.
    """

    arrays: dict[str, np.ndarray]

    @property
    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """See `Pictures`."""
        return {name: (str(values.dtype), values.shape[1:]) for name, values in self.arrays.items()}

    def read(self, rows: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        """See `Pictures`."""
        return {name: values[rows] for name, values in self.arrays.items()}


@dataclass(frozen=True, eq=False)
class Cases:
    """Everything that a folder says, one row per case; pictures stay in their stored type.

    Attributes:
      case_id: Unique names.
      marks: Split of each case (train, val, test or another word), "" where the folder says nothing.
      groups: Patient or scan of each case, "" where unknown.
      pictures: Images, volumes and masks.
      spacing: mm per pixel of each picture, in its array order.
      has: `has_image`, `has_volume`, where the folder says which cases lack that picture.
      table: Record fields in the order of `RECORD_FIELDS`, NaN where unknown; None if the folder has none.
      text: Texts, "" where missing; None if the folder has none.
      targets: Every finding, NaN where unknown.
    """

    case_id: list[str]
    marks: list[str]
    groups: list[str]
    pictures: Pictures
    spacing: dict[str, Float32[np.ndarray, "n _"]]
    has: dict[str, Bool[np.ndarray, "n"]]
    table: Float32[np.ndarray, "n fields"] | None
    text: list[str] | None
    targets: dict[str, Float32[np.ndarray, "n ..."]]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Sizes of one picture of each modality, volumes first."""
        layout = self.pictures.layout
        return [layout[name][1] for name in ("volume", "image") if name in layout]


def read_cases(files: Sequence[Path], hold: bool = True) -> tuple[Cases, list[str]]:
    """Reads archives and tables into one set of cases.

    Args:
      files: `.npz` files, whose cases follow each other in this order, and `.csv` files.
      hold: Keeps the pictures in memory; without, they are checked now and read again when they are asked for.

    Returns:
      The cases, and the labels of arrays and columns that the format does not know.

    Raises:
      UserError: Something is not as docs/data.md says.
    """
    archives: list[dict[str, Column]] = []
    lengths: list[int] = []
    ignored: list[str] = []
    for path in (path for path in files if path.suffix.lower() == ".npz"):
        columns, unknown = read_npz(path)
        length = next(len(column.values) for column in columns.values() if not one_row(column))
        columns = with_pictures(columns, sum(lengths), length)
        archives.append(columns if hold else _without_pixels(columns))
        lengths.append(length)
        ignored += unknown
    names = dict.fromkeys(name for columns in archives for name in columns)
    columns = {name: _join(name, archives, lengths) for name in names}
    for path in (path for path in files if path.suffix.lower() == ".csv"):
        table, unknown = read_csv(path)
        ignored += unknown
        for name, column in _align(table, columns, sum(lengths), path).items():
            if name in columns:
                raise UserError(f"{name} is given by {columns[name].where()} and by {column.where()}: keep one of them")
            columns[name] = column
    cases = check_cases(columns, sum(lengths))
    if not hold and cases.pictures.layout:
        paths = [path for path in files if path.suffix.lower() == ".npz"]
        starts = np.cumsum([0, *lengths])
        cases = dataclasses.replace(cases, pictures=ArchivePictures(tuple(paths), starts, cases.pictures.layout))
    return cases, list(dict.fromkeys(ignored))


def stand_in(dtype: str | np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Has the type and shape of pictures but none of their memory: for checks that do not look at pixels.

    Args:
      dtype: Of the pictures.
      shape: With the cases.

    Returns:
      Zeros that all lie in one place.
    """
    return np.broadcast_to(np.zeros((), dtype), shape)


def _is_stand_in(values: np.ndarray) -> bool:
    return values.size > 0 and not any(values.strides)


def _without_pixels(columns: dict[str, Column]) -> dict[str, Column]:
    return {
        name: dataclasses.replace(column, values=stand_in(column.values.dtype, column.values.shape))
        if name in PICTURES
        else column
        for name, column in columns.items()
    }


@dataclass(frozen=True, eq=False)
class ArchivePictures:
    """Pictures that stay in their archives, of which one at a time is in memory: to go through all of them in order.

    Attributes:
      paths: The archives.
      starts: First case of each, and the number of cases.
      layout: See `Pictures`.
      latest: Number and pictures of the archive read last.
    """

    paths: tuple[Path, ...]
    starts: Int[np.ndarray, "starts"]
    layout: dict[str, tuple[str, tuple[int, ...]]]
    latest: dict[int, dict[str, np.ndarray]] = field(default_factory=dict, repr=False)

    def read(self, rows: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        """See `Pictures`."""
        found = {name: np.empty((len(rows), *shape), dtype) for name, (dtype, shape) in self.layout.items()}
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(numbers).tolist():
            here = numbers == number
            for name, values in self._archive(number).items():
                found[name][here] = values[rows[here] - self.starts[number]]
        return found

    def _archive(self, number: int) -> dict[str, np.ndarray]:
        latest = self.latest.get(number)
        if latest is None:
            self.latest.clear()  # before the next one is read
            start, end = self.starts[number : number + 2].tolist()
            columns = with_pictures(read_npz(self.paths[number])[0], start, end - start)
            latest = {name: columns[name].values for name in self.layout}
            for name in RANK:
                if name in latest and latest[name].dtype != np.dtype(self.layout[name][0]):
                    latest[name] = hounsfield(latest[name])
            self.latest[number] = latest
        return latest


def with_pictures(columns: dict[str, Column], start: int, length: int) -> dict[str, Column]:
    """Brings the pictures of one archive to uint8 or int16.

    Args:
      columns: Of the archive.
      start: Number of its first case.
      length: How many it has.

    Returns:
      The columns, pictures replaced.

    Raises:
      UserError: A picture has broken values or values of no known unit.
    """
    names = [str(start + row).zfill(6) for row in range(length)]
    names = as_texts(columns["case_id"]) if "case_id" in columns else names
    pictures = {
        name: Column(columns[name].label, as_pictures(columns[name], names), columns[name].parts)
        for name in RANK
        if name in columns
    }
    return columns | pictures


def _join(name: str, archives: Sequence[dict[str, Column]], lengths: Sequence[int]) -> Column:
    """Puts the arrays of one name from all archives under each other; missing numbers become NaN, texts empty."""
    found = [columns[name] for columns in archives if name in columns]
    if len(archives) == 1:
        return found[0]
    if name in (*PICTURES, *FLAGS, *SPACINGS, "case_id") and len(found) < len(archives):
        raise UserError(
            f"{len(found)} of {len(archives)} .npz files have the array {found[0].label!r}"
            f" ({found[0].parts[0][0]} has): give it to all or to none"
        )
    blocks: list[np.ndarray] = []
    parts: list[tuple[str, int]] = []
    for columns, length in zip(archives, lengths, strict=True):
        start = sum(len(block) for block in blocks)
        column = columns.get(name)
        if column is None:
            values = np.full((length, *found[0].values.shape[1:]), "" if name in TEXTS else np.nan)
        elif name in TEXTS:
            values = np.array(as_texts(column))
        else:
            values = np.repeat(np.atleast_2d(column.values), length, axis=0) if one_row(column) else column.values
        blocks.append(values)
        parts += [] if column is None else [(column.parts[0][0], start)]
    if len({block.shape[1:] for block in blocks}) > 1:
        sizes = ", ".join(f"{list(column.values.shape[1:])} in {column.parts[0][0]}" for column in found)
        raise UserError(f"array {found[0].label!r} has rows of different sizes ({sizes}): bring them to one size")
    if _is_stand_in(blocks[0]):
        dtype = np.result_type(*blocks)
        return Column(found[0].label, stand_in(dtype, (sum(lengths), *blocks[0].shape[1:])), tuple(parts))
    if len({block.dtype for block in blocks}) > 1 and name in RANK:
        blocks = [hounsfield(block) if block.dtype == np.uint8 else block for block in blocks]
    return Column(found[0].label, np.concatenate(blocks), tuple(parts))


def _align(table: dict[str, Column], columns: dict[str, Column], total: int, path: Path) -> dict[str, Column]:
    """Brings the rows of a table to the order of the arrays, by `case_id` where both have it, else row by row."""
    if not table:
        return {}
    if "case_id" not in table or "case_id" not in columns:
        length = len(next(iter(table.values())).values)
        if length != total:
            raise UserError(
                f"{path} has {length} rows but the .npz files hold {total} cases: give it one row per case, or give"
                " both a case_id"
            )
        return table
    position = {name: row for row, name in enumerate(as_texts(columns["case_id"]))}
    ids = table["case_id"]
    rows: list[int] = []
    for row, name in enumerate(as_case_ids(ids)):
        if name not in position:
            raise UserError(f"{ids.at(row)} is {name!r}, which no .npz file holds{nearest(name, position)}: correct it")
        rows.append(position[name])
    aligned: dict[str, Column] = {}
    for name, column in table.items():
        values = np.full(total, "" if name in TEXTS else np.nan, column.values.dtype)
        values[rows] = column.values
        lines = np.zeros(total, int)
        lines[rows] = column.lines or ()
        aligned[name] = Column(column.label, values, column.parts, tuple(lines.tolist()))
    del aligned["case_id"]
    return aligned


def check_cases(columns: dict[str, Column], total: int) -> Cases:
    """Checks every column against the schema, and that every case says something.

    Args:
      columns: By the format's names; of pictures only type and shape are looked at.
      total: Number of cases.

    Returns:
      The cases.

    Raises:
      UserError: Something is not as docs/data.md says.
    """
    case_id = [str(row).zfill(6) for row in range(total)]
    case_id = as_case_ids(columns["case_id"]) if "case_id" in columns else case_id
    targets = _targets(columns, total)
    fields = [field.name for field in RECORD_FIELDS]
    table = None
    if any(name in columns for name in fields):
        unknown = np.full(total, np.nan, np.float32)
        table = np.stack([as_numbers(columns[name], name) if name in columns else unknown for name in fields], axis=1)
    text = as_texts(columns["text"]) if "text" in columns else None
    kinds = [name for name in RANK if name in columns]
    has = {
        f"has_{name}": as_numbers(columns[f"has_{name}"], f"has_{name}").astype(bool)
        for name in kinds
        if f"has_{name}" in columns
    }
    cases = Cases(
        case_id=case_id,
        marks=as_marks(columns["split"]) if "split" in columns else [""] * total,
        groups=as_texts(columns["group"]) if "group" in columns else [""] * total,
        pictures=ArrayPictures({name: columns[name].values for name in PICTURES if name in columns}),
        spacing={name: _spacing(columns, name, total) for name in kinds},
        has=has,
        table=table,
        text=text,
        targets=targets,
    )
    if "mask" in columns:
        check_mask(columns["mask"], cases.shapes)
    empty = np.ones(total, bool)
    for name in kinds:
        empty &= ~has.get(f"has_{name}", empty)
    empty &= np.isnan(table).all(axis=1) if table is not None else True
    empty &= np.array([not entry for entry in text]) if text is not None else True
    if empty.any():
        row, place = int(np.argmax(empty)), next(iter(columns.values())).parts
        others = int(empty.sum()) - 1
        raise UserError(
            f"case {case_id[row]!r} (row {row} of {', '.join(file for file, _ in place)}) has neither a picture nor a"
            f" record{f', and {others} more have none' if others else ''}: leave it out or fill it in"
        )
    return cases


def _targets(columns: dict[str, Column], total: int) -> dict[str, Float32[np.ndarray, "n ..."]]:
    """Checks the findings; `malignancy` with values above 1 holds ratings of readers, not outcomes."""
    known = dict(columns)
    column = known.get("malignancy")
    if column is not None and column.values.dtype.kind in "iuf" and bool((column.values > 1).any()):
        if "malignancy_rating" in known:
            other = known["malignancy_rating"]
            raise UserError(f"malignancy_rating is given by {other.where()} and by {column.where()}: keep one of them")
        known["malignancy_rating"] = known.pop("malignancy")
    return {
        finding.name: as_numbers(known[finding.name], finding.name)
        if finding.name in known
        else np.full((total, 3) if finding.kind == "vector" else (total,), np.nan, np.float32)
        for finding in FINDINGS
    }


def _spacing(columns: dict[str, Column], picture: str, total: int) -> Float32[np.ndarray, "n _"]:
    """Finds the voxel sizes of a picture; 1 mm where the folder gives none."""
    column = columns.get(f"{picture}_spacing", columns.get("spacing"))
    if column is None:
        return np.ones((total, RANK[picture] - 1), np.float32)
    return as_spacing(column, picture, total)
