"""MHD: MetaImage headers with their voxels beside them (.raw, .zraw) or behind them (.mha)."""

import functools
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from r1jax.data.formats.cases import FileCases
from r1jax.data.formats.files import file_size, list_files, read_bytes
from r1jax.data.formats.volume import Grid, common_dtype, read_volume, volume_cases
from r1jax.errors import UserError, nearest

SUFFIXES = (".mhd", ".mha")
HEADER_BYTES = 2**16
TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
"""MET_LONG and MET_ULONG are left out: their size depends on the machine that wrote them."""
ORIGIN = ("Offset", "Position", "Origin")
DIRECTION = ("TransformMatrix", "Rotation", "Orientation")
ORDER = ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
PACKED = "CompressedDataSize"
NEEDED = ("NDims", "DimSize", "ElementType", "ElementSpacing", "ElementDataFile")
KEYS = (
    *(*NEEDED, *ORIGIN, *DIRECTION, *ORDER),
    *("BinaryData", "CompressedData", PACKED, "HeaderSize", "ElementNumberOfChannels"),
)
UNITS = "DistanceUnits"
HARMLESS = (
    "ObjectType",
    UNITS,
    "CenterOfRotation",
    "AnatomicalOrientation",
    "ElementSize",
    "CompressedDataSize",
    "Comment",
)


@dataclass(frozen=True)
class Header:
    """What a header says.

    Attributes:
      grid: Of the array as stored, [z, y, x].
      stored: Type in the file, with its byte order.
      compressed: Whether the voxels are a zlib stream.
      data: File of the voxels, relative to the folder of the data set.
      skip: Bytes before the voxels in that file; -1 where they are its end.
      size: Bytes of the voxels in that file; None where they are compressed and the header does not say.
    """

    grid: Grid
    stored: str
    compressed: bool
    data: str
    skip: int
    size: int | None


def open_mhd(path: str | Path) -> FileCases:
    """Opens a folder of MetaImage volumes as a source.

    Args:
      path: The folder, or one file.

    Returns:
      The volumes; see `volume_cases`.

    Raises:
      UserError: A header is damaged, of two or four axes or of several channels, or the voxels do not fit it.
    """
    root, names = list_files(path, SUFFIXES, "MetaImage header")
    headers = tuple(read_header(root, name) for name in names)
    for name, header in zip(names, headers, strict=True):
        size, wanted = file_size(root, header.data), (header.size or 0) + max(header.skip, 0)
        if header.size is not None and (size < wanted if header.skip < 0 else size != wanted):
            raise UserError(f"{root / header.data} has {size} bytes but {name} says {wanted}: copy both again")
    grids = [header.grid for header in headers]
    dtype = common_dtype([grid.dtype for grid in grids], root)
    read = functools.partial(_read, root, tuple(names), headers, dtype)
    files = sorted({*names, *(header.data for header in headers)})
    return volume_cases(root, files, "mhd", names, grids, read)


def read_header(root: Path, name: str) -> Header:
    """Reads a header.

    Args:
      root: Folder of the data set.
      name: Of the file, relative to it.

    Returns:
      What it says.

    Raises:
      UserError: A key is missing, misspelt, there twice, or has a value that makes no sense.
    """
    file = root / name
    keys, end = _keys(read_bytes(root, name, HEADER_BYTES), file)
    channels = _numbers(keys, ("ElementNumberOfChannels",), 1, file, [1.0])
    if channels != [1.0] or _flag(keys, ("BinaryData",), file, default=True) is False:
        raise UserError(f"{file} holds several channels or text: save one channel in binary form")
    if keys.get(UNITS, "mm") != "mm":
        raise UserError(f"{file} measures lengths in {keys[UNITS]!r}: save it in mm")
    if _whole(keys, "NDims", 1, file) != [3]:
        raise UserError(f"{file} has {keys['NDims']} axes: volumes have 3 (save slices as images)")
    if keys["ElementType"] not in TYPES:
        raise UserError(f"{file} has ElementType {keys['ElementType']!r}: save it as one of {', '.join(TYPES)}")
    big = _flag(keys, ORDER, file, default=False)
    stored = np.dtype(TYPES[keys["ElementType"]]).newbyteorder(">" if big else "<")
    grid = Grid(tuple(_whole(keys, "DimSize", 3, file)[::-1]), stored.newbyteorder("=").name, _affine(keys, file))
    grid.check(str(file))
    compressed = _flag(keys, ("CompressedData",), file, default=False)
    local = keys["ElementDataFile"].upper() == "LOCAL"
    skip = end if local else _whole(keys, "HeaderSize", 1, file)[0] if "HeaderSize" in keys else 0
    if skip < (0 if compressed else -1):
        raise UserError(f"{file} has HeaderSize {skip}: 0 or more, or -1 if not compressed")
    size = int(np.prod(grid.shape)) * stored.itemsize
    if compressed:
        size = _whole(keys, PACKED, 1, file)[0] if PACKED in keys else None
    data = name if local else _data_file(keys["ElementDataFile"], name, file)
    return Header(grid, stored.str, compressed, data, skip, size)


def _keys(head: bytes, file: Path) -> tuple[dict[str, str], int]:
    """Reads `key = value` lines up to ElementDataFile, which is the last, and the byte where it ends."""
    keys: dict[str, str] = {}
    place = 0
    while "ElementDataFile" not in keys:
        end = head.find(b"\n", place)
        line = head[place : end if end >= 0 else len(head)]
        place = end + 1 if end >= 0 else len(head)
        try:
            key, mark, value = (part.strip() for part in line.decode("utf-8").partition("="))
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is no MetaImage header or damaged: write or copy it again") from error
        if line.strip() and (
            not mark or not re.fullmatch(r"[A-Za-z]\w*", key) or not value.isprintable() or "=" in value
        ):
            raise UserError(f"{file} is no MetaImage header or damaged: {line[:40]!r} is no line `key = value`")
        if key in keys:
            raise UserError(f"{file} has {key!r} twice: keep one")
        known = KEYS + HARMLESS
        if key not in known and (nearest(key, known, cutoff=0.8) or key.startswith(KEYS)):
            raise UserError(f"{file} has the key {key!r}{nearest(key, known)}: correct it")
        if mark:
            keys[key] = value
        if end < 0:
            break
    missing = [key for key in NEEDED if not keys.get(key)]
    if missing:
        raise UserError(f"{file} is no MetaImage header or damaged: {missing[0]} is missing, write or copy it again")
    if keys.get("ObjectType", "Image") != "Image":
        raise UserError(f"{file} holds an object of type {keys['ObjectType']!r}: volumes have ObjectType = Image")
    return keys, place


def _affine(keys: Mapping[str, str], file: Path) -> np.ndarray:
    """Puts spacing, direction and origin together; MetaImage lists x first, and one row of the matrix an axis."""
    spacing = _numbers(keys, ("ElementSpacing",), 3, file, [])
    if min(spacing) <= 0:
        raise UserError(f"{file} has ElementSpacing {keys['ElementSpacing']!r}: mm between voxels are above 0")
    rows = np.array(_numbers(keys, DIRECTION, 9, file, np.eye(3).ravel().tolist())).reshape(3, 3)
    lengths = np.linalg.norm(rows, axis=1)
    if np.abs(lengths - 1).max() > 1e-2:
        raise UserError(f"{file} has a {DIRECTION[0]} whose rows have lengths {lengths}, not 1: repair it")
    affine = np.eye(4)
    affine[:3, :3] = (rows * np.array(spacing)[:, None])[::-1].T
    affine[:3, 3] = _numbers(keys, ORIGIN, 3, file, [0.0, 0.0, 0.0])
    return affine


def _numbers(
    keys: Mapping[str, str], names: tuple[str, ...], count: int, file: Path, default: list[float]
) -> list[float]:
    """Reads numbers under one of several names of the same thing."""
    given = [name for name in names if name in keys]
    if not given:
        return default
    try:
        values = [float(word) for word in keys[given[0]].split()]
    except ValueError:
        values = []
    if len(values) != count or len(given) > 1 or not np.isfinite(values).all():
        raise UserError(f"{file} has {' and '.join(given)} = {keys[given[0]]!r}: give {count} numbers, once")
    return values


def _whole(keys: Mapping[str, str], name: str, count: int, file: Path) -> list[int]:
    values = _numbers(keys, (name,), count, file, [])
    if any(value != int(value) for value in values):
        raise UserError(f"{file} has {name} = {keys[name]!r}: give whole numbers")
    return [int(value) for value in values]


def _flag(keys: Mapping[str, str], names: tuple[str, ...], file: Path, default: bool) -> bool:
    said = {keys[name].lower() for name in names if name in keys}
    if not said <= {"true", "false"} or len(said) > 1:
        raise UserError(f"{file} has {' or '.join(names)} = {sorted(said)}: write True or False")
    return said == {"true"} if said else default


def _data_file(value: str, name: str, file: Path) -> str:
    """Resolves the file of the voxels, beside the header."""
    if value.upper().startswith("LIST") or "%" in value:
        raise UserError(f"{file} spreads its voxels over several files: save it with one")
    folder = name.rpartition("/")[0]
    return f"{folder}/{value}" if folder and not Path(value).is_absolute() else value


def _read(
    root: Path, names: tuple[str, ...], headers: tuple[Header, ...], dtype: str, row: int
) -> dict[str, np.ndarray]:
    header, file = read_header(root, names[row]), root / names[row]
    data, wanted = read_bytes(root, header.data), int(np.prod(header.grid.shape)) * np.dtype(header.stored).itemsize
    body = data[-wanted:] if header.skip < 0 else data[header.skip :]
    if header.size not in (None, len(body)):
        raise UserError(f"{root / header.data} has {len(body)} bytes but {file} says {header.size}: copy both again")
    if header.compressed:
        stream = zlib.decompressobj()
        try:
            body, rest = stream.decompress(body, wanted + 1), stream.unused_data
        except zlib.error as error:
            raise UserError(f"the voxels of {file} are damaged ({error}): write or copy it again") from error
        if not stream.eof or rest:
            raise UserError(f"the voxels of {file} are damaged, cut short or more than it says: copy it again")
    if len(body) != wanted:
        raise UserError(f"{root / header.data} holds {len(body)} bytes but {file} says {wanted}: copy both again")
    stored = np.frombuffer(body, header.stored).reshape(header.grid.shape)
    return read_volume(stored, header.grid, headers[row].grid, dtype, str(file))
