"""Images: a folder of PNG, JPEG, TIFF and BMP files, with classes as folders or a table beside them."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from r1jax.data.formats.cases import CASE_ID, FileCases, file_cases
from r1jax.data.formats.files import class_folders, list_files, read_bytes
from r1jax.data.formats.picture import Header, check_decodes, read_header, read_pixels
from r1jax.data.formats.tables import Table
from r1jax.data.schema import Field
from r1jax.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
HEADER_BYTES = 2**18
"""Headers are looked for in so much of a file at first; few have more before them than that."""


def open_images(
    path: str | Path,
    form: Literal["bytes", "pixels"] = "bytes",
    column: str | None = None,
    kinds: Mapping[str, str] | None = None,
) -> FileCases:
    """Opens a folder of pictures as a source.

    Args:
      path: The folder. The first folder in each name is the class, column `label`; or the pictures lie in one folder
        with one `.csv` whose rows name them.
      form: "bytes" gives each file as it is, once it decodes; "pixels" gives [H, W] or [H, W, C].
      column: The column of the table that names the files; without it, the one whose every cell does.
      kinds: See `open_table`, for the other columns.

    Returns:
      The pictures, by name; or those that the table names, in its order.

    Raises:
      UserError: A file is no picture that can be read, a name in the table is no picture of the folder, or pictures of
        8 and 16 bits are to be read as pixels together.
    """
    root, names = list_files(path, SUFFIXES, "picture")
    tables = [] if Path(path).is_file() else [file.name for file in sorted(root.glob("*.csv")) if file.is_file()]
    if len(tables) > 1:
        raise UserError(f"{root} holds {len(tables)} tables, {tables[0]!r} and {tables[1]!r}: keep the one of pictures")
    known: list[tuple[Field, Sequence[str] | pa.Array]] = []
    what = f"images ({form})"
    if tables:
        found = len(names)
        names, known = _from_table(root, tables[0], names, column, kinds or {})
        left = found - len(names)
        what += f"; {left} pictures that {tables[0]} does not name are left out" if left else ""
    elif column is not None:
        raise UserError(f"{root} has no .csv file, whose column {column!r} could name the pictures: put it there")
    elif (labels := class_folders(root, names)) is not None:
        known = [(Field("label", "category"), labels)]
    headers = [_header(root, name) for name in names]
    channels = max(header.channels for header in headers)
    image = _pixels(root, names, headers, channels) if form == "pixels" else Field("image", "bytes")
    read = functools.partial(_read, root, tuple(names), channels, form)
    return file_cases(root, [*names, *tables], what, [(CASE_ID, names), *known], [image], read)


def _header(root: Path, name: str) -> Header:
    """Reads the header from the beginning of a file, or from all of it where that is not enough."""
    start = read_bytes(root, name, HEADER_BYTES)
    try:
        return read_header(start, str(root / name))
    except UserError:
        if len(start) < HEADER_BYTES:
            raise
        return read_header(read_bytes(root, name), str(root / name))


def _pixels(root: Path, names: Sequence[str], headers: Sequence[Header], channels: int) -> Field:
    """Declares the pixels of all pictures: axes of varying size as None."""
    types = {header.dtype: name for name, header in zip(names, headers, strict=True)}
    if len(types) > 1 or ("uint16" in types and channels > 1):
        other = next(name for name, header in zip(names, headers, strict=True) if header.dtype == "uint8")
        pair = f"{root / types['uint16']} has 16 bits in grey but {other} is of another kind"
        raise UserError(f"{pair}: read them from separate folders, or with form 'bytes'")
    sizes = [{header.height for header in headers}, {header.width for header in headers}]
    shape = tuple(size.pop() if len(size) == 1 else None for size in sizes)
    return Field("image", "image", headers[0].dtype, (*shape, channels) if channels > 1 else shape)


def _read(root: Path, names: tuple[str, ...], channels: int, form: str, row: int) -> dict[str, np.ndarray | bytes]:
    data, where = read_bytes(root, names[row]), str(root / names[row])
    if form == "pixels":
        return {"image": read_pixels(data, channels, where)}
    check_decodes(data, where)
    return {"image": data}


def _from_table(
    root: Path, name: str, pictures: Sequence[str], column: str | None, kinds: Mapping[str, str]
) -> tuple[list[str], list[tuple[Field, pa.Array]]]:
    """Reads which pictures a table names, and its other columns."""
    table = Table.read(root, name)
    exact = {picture: picture for picture in pictures}
    stems = [picture.rsplit(".", 1)[0] for picture in pictures]
    counts = Counter(stems)
    short = {stem: picture for stem, picture in zip(stems, pictures, strict=True) if counts[stem] == 1}
    by_name = short | exact
    typed = table.typed(kinds)
    if column is None:
        column = _naming_column(table, by_name)
    chosen = []
    for row, cell in enumerate(table.keys(column).to_pylist()):
        if cell not in by_name:
            where = f"column {column!r} in line {table.line(row)} of {table.file}"
            raise UserError(f"{where} names {cell!r}, which is no picture in {root}: write a name relative to it")
        chosen.append(by_name[cell])
    twice, times = Counter(chosen).most_common(1)[0] if chosen else ("", 0)
    if times > 1:
        raise UserError(f"column {column!r} of {table.file} names {twice!r} twice: keep one row")
    del typed[column]
    for reserved in {"case_id", "image"} & set(typed):
        raise UserError(f"{table.file} has a column {reserved!r} of its own: rename it")
    return chosen, list(typed.values())


def _naming_column(table: Table, by_name: Mapping[str, str]) -> str:
    """Finds the one column whose every cell names a picture, or else that with most of them, which is then at fault."""
    hits = {
        name: sum(cell.strip() in by_name for cell in table.cells.column(name).to_pylist())
        for name in table.cells.column_names
    }
    best = max(hits, key=lambda name: hits[name])
    if not hits[best]:
        raise UserError(f"no column of {table.file} names the pictures beside it: one must hold their file names")
    return best
