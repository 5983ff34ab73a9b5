"""What is known of Parquet files before a row is read: footers, partitions, columns, and that they fit together."""

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt32

from r1jax.data.bounded import FAILURES
from r1jax.data.card import CARD, Card
from r1jax.data.files import Files, Listed
from r1jax.data.schema import Field, Schema, from_arrow
from r1jax.errors import UserError, nearest

TAIL = 2**16
"""Bytes read first of a file's end; most footers fit."""
MAGIC = b"PAR1"
Columns = Sequence[str] | Callable[[str], bool] | None
"""Names of columns, a test of names, or all."""
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True, eq=False)
class ParquetPart:
    """One file; picklable.

    Attributes:
      name: Relative to the data set.
      size: Bytes.
      footer: The file's last bytes, from its metadata on.
      rows: Of each row group.
      partitions: Values of the `key=value` folders it lies in.
      sums: CRC-32 of each column in each row group; None where the data set has no card.
      checked: Whether the pages carry sums of their own.
    """

    name: str
    size: int
    footer: bytes
    rows: tuple[int, ...]
    partitions: dict[str, str | None]
    sums: UInt32[np.ndarray, "groups columns"] | None
    checked: bool

    @cached_property
    def metadata(self) -> pq.FileMetaData:
        """The parsed footer."""
        return pq.read_metadata(pa.BufferReader(MAGIC + self.footer))


def chunk_range(column: pq.ColumnChunkMetaData) -> tuple[int, int]:
    """Finds the bytes of a column in a row group.

    Args:
      column: Of the footer.

    Returns:
      First byte and number of bytes.
    """
    first = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset is not None:
        first = min(first, column.dictionary_page_offset)
    return first, column.total_compressed_size


def read_parts(files: Files, listed: Sequence[Listed], card: Card | None) -> tuple[ParquetPart, ...]:
    """Reads the footers of all files, those on a server several at a time.

    Args:
      files: Where they lie.
      listed: Their names and sizes.
      card: Of the data set, if there is one; every file must be as it says.

    Returns:
      The files, in the order given.

    Raises:
      UserError: A file is missing, cut short, damaged or not of the card; names it.
    """
    known = {shard.name: shard for shard in card.shards} if card else {}
    _check_listing(files, listed, card)
    tails = files.read_many([(item.name, [(max(item.size - TAIL, 0), min(item.size, TAIL))]) for item in listed])
    parts = []
    for item, (tail,) in zip(listed, tails, strict=True):
        shard = known.get(item.name)
        footer = _footer(files, item, tail)
        if shard is not None and hashlib.sha256(footer).hexdigest() != shard.footer:
            raise UserError(f"{files.url}/{item.name}: its footer is not the one of {CARD}: copy the data set again")
        part = ParquetPart(
            item.name, item.size, footer, (), _partitions(item.name), shard and shard.sums(), shard is not None
        )
        try:
            metadata = part.metadata
            rows = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
            checked = part.checked or _has_page_sums(files, item.name, metadata)
        except FAILURES as error:
            raise UserError(f"{files.url}/{item.name}: its footer is damaged ({error}): copy the file again") from error
        parts.append(ParquetPart(item.name, item.size, footer, rows, part.partitions, part.sums, checked))
    return tuple(parts)


def _check_listing(files: Files, listed: Sequence[Listed], card: Card | None) -> None:
    """Compares the files that are there with those of the card."""
    if card is None:
        return
    sizes = {item.name: item.size for item in listed}
    for shard in card.shards:
        if shard.name not in sizes:
            raise UserError(f"{files.url}/{shard.name} is missing, which {CARD} lists: copy the data set again")
        if sizes[shard.name] != shard.size:
            raise UserError(
                f"{files.url}/{shard.name} has {sizes[shard.name]} bytes where {CARD} says {shard.size}: it was cut"
                " short or written again; copy the data set again"
            )
    extra = sorted(set(sizes) - {shard.name for shard in card.shards})
    if extra:
        raise UserError(f"{files.url}/{extra[0]} is not in {CARD}: move it away, or remove {CARD}")


def _footer(files: Files, item: Listed, tail: bytes) -> bytes:
    """The end of a file from its metadata on; reads once more where it is long."""
    broken = UserError(f"{files.url}/{item.name} is cut short or no Parquet file: copy it again")
    if len(tail) != min(item.size, TAIL) or len(tail) < 12 or tail[-4:] != MAGIC:
        raise broken
    length = struct.unpack("<I", tail[-8:-4])[0] + 8
    if length > item.size - 4:
        raise broken
    return tail[-length:] if length <= len(tail) else files.read(item.name, [(item.size - length, length)])[0]


def _has_page_sums(files: Files, name: str, metadata: pq.FileMetaData) -> bool:
    """Looks whether the first page of a file has a sum; its head is Thrift's compact protocol."""
    if metadata.num_rows == 0 or metadata.num_columns == 0:
        return True
    first, length = chunk_range(metadata.row_group(0).column(0))
    head = files.read(name, [(first, min(length, 64))])[0]
    at = 0
    for _ in range(3):  # type, sizes of the page: fields 1 to 3, one type byte and a varint each
        at += 1
        while head[at : at + 1] >= b"\x80":
            at += 1
        at += 1
    return head[at : at + 1] == b"\x15"  # field 4, an int: the sum; other fields come with a larger step


def _partitions(name: str) -> dict[str, str | None]:
    """Values that the folders of a file give (Hive's `key=value`)."""
    pairs = [folder.partition("=") for folder in name.split("/")[:-1]]
    values = {unquote(key): unquote(value) for key, equals, value in pairs if equals}
    return {key: None if value == NULL_PARTITION else value for key, value in values.items()}


def common_schema(files: Files, parts: Sequence[ParquetPart], columns: Columns) -> Schema:
    """Finds the schema that all files share.

    Args:
      files: Where they lie, for errors.
      parts: At least one file.
      columns: Those that are asked for.

    Returns:
      The fields in the order of the first file, then the partitions.

    Raises:
      UserError: A column is missing in a file, of another type there, or of a type that r1jax does not read.
    """
    schemas = [(part.name, _fields(files, part, columns)) for part in parts]
    first, fields = schemas[0]
    for wanted in () if columns is None or callable(columns) else columns:
        if wanted not in fields:
            there = [*parts[0].metadata.schema.to_arrow_schema().names, *parts[0].partitions]
            raise UserError(
                f"{files.url}/{first} has no column {wanted!r}{nearest(wanted, there)}: it has {', '.join(there)}"
            )
    for name, others in schemas[1:]:
        for column in dict.fromkeys([*fields, *others]):
            if column not in others or column not in fields:
                lacking, having = (name, first) if column not in others else (first, name)
                raise UserError(
                    f"{files.url}/{lacking} has no column {column!r}, which {having} has: write all files alike"
                )
            if others[column] != fields[column]:
                raise UserError(
                    f"{files.url}/{name}: column {column!r} is {_told(others[column])}, but"
                    f" {_told(fields[column])} in {first}: write all files alike"
                )
    return Schema(tuple(fields.values()))


def _fields(files: Files, part: ParquetPart, columns: Columns) -> dict[str, Field]:
    """Fields of one file by name, only those asked for where they are there."""
    asked = columns if callable(columns) else lambda name: columns is None or name in columns
    try:
        arrow = part.metadata.schema.to_arrow_schema()
        both = next((key for key in part.partitions if key in arrow.names), None)
        if both is not None:
            raise UserError(f"column {both!r} is in the file and in the name of its folder: keep one of them")
        kept = [column for column in arrow if asked(column.name)]
        fields = from_arrow(pa.schema(kept)).fields
    except UserError as error:
        raise UserError(f"{files.url}/{part.name}: {error}") from error
    except FAILURES as error:
        raise UserError(f"{files.url}/{part.name}: its footer is damaged ({error}): copy the file again") from error
    named = {field.name: field for field in fields}
    return named | {key: Field(key, "category") for key in part.partitions if asked(key)}


def _told(field: Field) -> str:
    return " ".join(filter(None, [field.kind, field.dtype, str(list(field.shape)) if field.shape else ""]))
