"""The cold store: rows of Parquet files behind any URL, read by row group, every byte compared with its sum."""

import dataclasses
import hashlib
import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from r1jax.data.bounded import FAILURES
from r1jax.data.card import CARD, UNFINISHED, read_card
from r1jax.data.files import Files
from r1jax.data.filesystem import is_remote
from r1jax.data.parquet_files import Columns, ParquetPart, chunk_range, common_schema, read_parts
from r1jax.data.schema import Schema
from r1jax.errors import UserError

GAP = 2**16
"""Bytes that are read for nothing rather than asking twice."""
SUFFIX = ".parquet"


@dataclass(frozen=True, eq=False)
class ParquetStore:
    """Row groups of all files below a URL, in the order of their names; picklable, safe to use from several threads.

    Attributes:
      url: Folder or single file.
      schema: Columns that are read.
      fingerprint: sha256 (hex) over schema and files: their own sums where there is a card, so that it stays when the
        files are copied; else names, sizes, times (or ETags) and row groups.
      starts: First row of each row group, and the number of rows.
      remarks: What a user should know of the files.
      files: Reads them.
      parts: The files.
      groups: File and number in it, of each row group.
    """

    url: str
    schema: Schema
    fingerprint: str
    starts: Int64[np.ndarray, "starts"]
    remarks: tuple[str, ...]
    files: Files
    parts: tuple[ParquetPart, ...]
    groups: tuple[tuple[int, int], ...]

    @classmethod
    def open(cls, url: str, columns: Columns = None) -> "ParquetStore":
        """Reads the footers of all files, and the card that r1jax wrote beside them.

        Args:
          url: As `filesystem.open_filesystem` takes it: a folder of `.parquet` files, also in folders `key=value`, or
            one file.
          columns: Those to read, partitions included: their names, or a test of names; None reads all.

        Returns:
          The store.

        Raises:
          UserError: There is no such file, one is damaged, or they do not fit together; names file and column.
        """
        files, single = _files(url)
        listed = [item for item in files.listing() if item.name.endswith(SUFFIX) and single in (None, item.name)]
        card = read_card(files)
        unfinished = None if card else read_card(files, UNFINISHED)
        if unfinished:
            done = sum(shard.rows for shard in unfinished.shards)
            raise UserError(
                f"{url} is not written to its end ({done} of {unfinished.rows} rows): run the command that writes it"
                f" again: {unfinished.command}"
            )
        if not listed:
            raise UserError(
                f"{url} has no {SUFFIX} file: give a folder that holds some, or write it: r1jax data convert"
            )
        if card and single:
            card = dataclasses.replace(card, shards=tuple(shard for shard in card.shards if shard.name == single))
        parts = read_parts(files, listed, card)
        schema = common_schema(files, parts, columns)
        digest = hashlib.sha256(str(schema).encode())
        if card:
            digest.update(card.fingerprint.encode())
        for part in () if card else parts:
            digest.update(f"\n{part.name} {part.size} {files.stamp(part.name)} {part.rows}".encode())
        unchecked = [part.name for part in parts if not part.checked]
        remarks = []
        if unchecked:
            more = f" and {len(unchecked) - 1} more files" if len(unchecked) > 1 else ""
            remarks = [f"no page checksums in {unchecked[0]}{more}, damage to them cannot be seen"]
        sizes = [rows for part in parts for rows in part.rows]
        return cls(
            url=url,
            schema=schema,
            fingerprint=digest.hexdigest(),
            starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)]),
            remarks=tuple(remarks),
            files=files,
            parts=parts,
            groups=tuple((number, group) for number, part in enumerate(parts) for group in range(len(part.rows))),
        )

    def __len__(self) -> int:
        return int(self.starts[-1])

    def select(self, names: Sequence[str]) -> "ParquetStore":
        """Keeps some of the columns.

        Args:
          names: Which.

        Returns:
          A store that reads only these.

        Raises:
          UserError: A name is none of them.
        """
        schema = self.schema.select(names)
        digest = hashlib.sha256(f"{self.fingerprint} {schema}".encode())
        return dataclasses.replace(self, schema=schema, fingerprint=digest.hexdigest())

    def read_blocks(self, blocks: Sequence[int], columns: Sequence[str] | None = None) -> list[pa.RecordBatch]:
        """Reads row groups: the bytes of a file's groups together, from a server several files at a time.

        Args:
          blocks: Numbers of row groups, in any order, repeated or not.
          columns: Only these; None takes all of the schema.

        Returns:
          One batch each.

        Raises:
          UserError: A file cannot be read or is damaged; names it and the row group.
        """
        schema = self.schema if columns is None else self.schema.select(columns)
        wanted: dict[int, list[int]] = {}
        for block in dict.fromkeys(blocks):
            number, group = self.groups[block]
            wanted.setdefault(number, []).append(group)
        readers = [_PartReader(self, number, sorted(groups), schema) for number, groups in wanted.items()]
        answers = self.files.read_many([(reader.part.name, reader.ranges) for reader in readers])
        found: dict[tuple[int, int], pa.RecordBatch] = {}
        for reader, pieces in zip(readers, answers, strict=True):
            for group, batch in zip(reader.wanted, reader.decode(pieces), strict=True):
                found[reader.number, group] = batch
        return [found[self.groups[block]] for block in blocks]

    def read_columns(self, names: Sequence[str]) -> dict[str, Any]:
        """Reads whole columns, small ones: names of cases, marks, answers.

        Args:
          names: Which.

        Returns:
          By name, what `Field.decode` gives of all rows.

        Raises:
          UserError: As `read_blocks`.
        """
        schema = self.schema.select(names)
        batches = self.read_blocks(range(len(self.groups)), schema.names)
        return schema.decode(pa.Table.from_batches(batches, batches[0].schema if batches else schema.arrow))


def _files(url: str) -> tuple[Files, str | None]:
    """The folder that a URL names, or the folder of the file that it names, and then that file."""
    bare, mark, options = url.partition("?") if is_remote(url) else (url, "", "")
    head, slash, tail = bare.rstrip("/").rpartition("/")
    if not tail.endswith(SUFFIX):
        return Files(url), None
    return Files((head or slash or ".") + mark + options), tail


class _PartReader:
    """Finds the bytes of some row groups of one file, and turns them into batches."""

    def __init__(self, store: ParquetStore, number: int, groups: list[int], schema: Schema) -> None:
        self.part, self.number, self.wanted, self.schema = store.parts[number], number, groups, schema
        self.label = f"{store.files.url}/{self.part.name}"
        self.metadata = self.part.metadata
        self.names = [name for name in schema.names if name not in self.part.partitions]
        self.categories = [f.name for f in schema.fields if f.kind == "category" and f.name in self.names]
        names = [self.metadata.schema.column(index).path for index in range(self.metadata.num_columns)]
        self.columns = [index for index, name in enumerate(names) if name in set(self.names)]
        self.chunks = {
            (group, column): chunk_range(self.metadata.row_group(group).column(column))
            for group in groups
            for column in self.columns
        }
        self.ranges: list[tuple[int, int]] = []
        for first, length in sorted(self.chunks.values()):
            if self.ranges and first - sum(self.ranges[-1]) <= GAP:
                start, had = self.ranges[-1]
                self.ranges[-1] = start, max(had, first + length - start)
            else:
                self.ranges.append((first, length))

    def decode(self, pieces: list[bytes]) -> list[pa.RecordBatch]:
        """Compares the sums of the bytes read and decodes them."""
        file = _Pieces(self.part.size, [(first, piece) for (first, _), piece in zip(self.ranges, pieces, strict=True)])
        for (group, column), (first, length) in self.chunks.items():
            chunk = file.at(first, length)
            good = len(chunk) == length
            if good and self.part.sums is not None:
                good = zlib.crc32(chunk) == self.part.sums[group, column]
            if not good:
                self._damaged(group, f"column {self.metadata.schema.column(column).path!r} differs from its checksum")
        return [self._group(file, group) for group in self.wanted]

    def _group(self, file: "_Pieces", group: int) -> pa.RecordBatch:
        try:
            opened = pq.ParquetFile(
                pa.PythonFile(file, mode="r"),
                metadata=self.metadata,
                pre_buffer=False,
                page_checksum_verification=True,
                read_dictionary=self.categories,
            )
            table = opened.read_row_group(group, columns=self.names, use_threads=False).combine_chunks()
        except (*FAILURES, pa.ArrowException, MemoryError) as error:
            self._damaged(group, str(error).splitlines()[0])
        if table.num_rows != self.part.rows[group]:
            self._damaged(group, f"it holds {table.num_rows} rows where the footer says {self.part.rows[group]}")
        columns = [self._column(table, name) for name in self.schema.names]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema.arrow)

    def _column(self, table: pa.Table, name: str) -> pa.Array:
        wanted = self.schema.arrow.field(name).type
        if name in self.part.partitions:
            return pa.array([self.part.partitions[name]] * table.num_rows, pa.string()).cast(wanted)
        column = table.column(name)
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
        return array if array.type == wanted else array.cast(wanted)

    def _damaged(self, group: int, why: str) -> None:
        known = f"; r1jax data verify names all that differs from {CARD}" if self.part.sums is not None else ""
        raise UserError(f"{self.label}: row group {group} is damaged ({why}): copy the file again{known}")


class _Pieces(io.RawIOBase):
    """A file of which only some parts are here; reading elsewhere is an error."""

    def __init__(self, size: int, pieces: list[tuple[int, bytes]]) -> None:
        super().__init__()
        self.size, self.pieces, self.position = size, pieces, 0

    def at(self, first: int, length: int) -> memoryview:
        """Bytes from a place on, fewer where the piece ends."""
        for start, piece in self.pieces:
            if start <= first and first + length <= start + len(piece):
                return memoryview(piece)[first - start : first - start + length]
        return memoryview(b"")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = base + offset
        return self.position

    def read(self, size: int = -1) -> bytes:
        """Reads from the position on."""
        for start, piece in self.pieces:
            if start <= self.position < start + len(piece):
                end = len(piece) if size < 0 else self.position - start + size
                found = piece[self.position - start : end]
                self.position += len(found)
                return found
        return b""
