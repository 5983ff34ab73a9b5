"""What a row of a data set holds and how it lies in Arrow: sources, Parquet files and plug-ins share it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from r1jax.errors import UserError

Kind = Literal["volume", "image", "audio", "series", "table", "text", "category", "number", "bytes"]
MODALITIES = frozenset(("volume", "image", "audio", "series", "table", "text"))
"""Kinds that a model reads; the others are targets, names and marks."""
WORDS = ("text", "category")
METADATA = b"r1jax"
"""Key under which an Arrow field says its kind, dtype and shape."""


@dataclass(frozen=True)
class Field:
    """One named thing that every row has, or lacks (then it is null in Arrow).

    Attributes:
      name: Of the column, and of the key in a batch.
      kind: What it is; `bytes` is a file as it was (a JPEG, say), which a preprocessor decodes.
      dtype: NumPy's name of the type of numbers; "" for words and bytes. A text of numbers is tokens.
      shape: Of one row's numbers; None where an axis differs from row to row.
    """

    name: str
    kind: Kind
    dtype: str = ""
    shape: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        """Refuses what cannot be stored.

        Raises:
          UserError: The dtype does not fit the kind.
        """
        if self.kind in ("category", "bytes") or (self.kind == "text" and not self.dtype):
            if self.dtype or self.shape:
                raise UserError(f"field {self.name!r} ({self.kind}) has a dtype or a shape: only numbers have")
        elif not self.dtype or np.dtype(self.dtype).kind not in "biuf":
            raise UserError(f"field {self.name!r} ({self.kind}) has dtype {self.dtype!r}: name a type of plain numbers")

    @cached_property
    def arrow(self) -> pa.Field:
        """Column of this field: words (dictionary-coded categories), single numbers, or little-endian bytes."""
        if self.kind == "category":
            stored = pa.dictionary(pa.int32(), pa.string())
        elif self.kind == "text" and not self.dtype:
            stored = pa.string()
        elif self.kind == "bytes" or self.shape:
            stored = pa.binary()
        else:
            stored = pa.from_numpy_dtype(np.dtype(self.dtype))
        shape = ",".join("*" if size is None else str(size) for size in self.shape)
        return pa.field(self.name, stored, metadata={METADATA: f"{self.kind};{self.dtype};{shape}".encode()})

    def encode(self, values: Sequence[Any]) -> pa.Array:
        """Turns one value a row into a column.

        Args:
          values: Numbers or arrays of the field's shape, strings, or bytes; None where a row lacks the field.

        Returns:
          The column.

        Raises:
          UserError: A value has another dtype or shape.
        """
        stored = self.arrow.type
        if not self.shape:
            try:
                return pa.array(values, stored)
            except (pa.ArrowException, OverflowError) as error:
                raise UserError(f"field {self.name!r} ({self.kind}): {error}") from error
        return pa.array([None if value is None else self._pack(np.asarray(value)) for value in values], stored)

    def decode(self, column: pa.Array) -> list[Any] | np.ndarray:
        """Turns a column back into what a batch holds.

        Args:
          column: As `encode` gave it.

        Returns:
          Words: B strings, "" where missing. Bytes: a list with None where missing. Single numbers: [B], NaN where
          missing (integers with a missing value become float64). Arrays of a fixed shape: [B, ...], zeros where
          missing. Arrays of varying shape: a list, None where missing.

        Raises:
          UserError: The stored bytes are not an array of this field.
        """
        if self.kind in WORDS and not self.dtype:
            return ["" if value is None else value for value in column.to_pylist()]
        if self.kind == "bytes":
            return column.to_pylist()
        if not self.shape:
            if column.null_count and pa.types.is_boolean(column.type):
                column = column.cast(pa.int8())
            return column.to_numpy(zero_copy_only=False)
        if None in self.shape:
            return [None if value is None else self._unpack(value) for value in column.to_pylist()]
        return self._unpack_all(column)

    def _pack(self, value: np.ndarray) -> bytes:
        """Little-endian bytes in C order, after the sizes (int32) where an axis varies."""
        fits = value.ndim == len(self.shape) and all(
            want in (None, size) for want, size in zip(self.shape, value.shape, strict=True)
        )
        if value.dtype != np.dtype(self.dtype) or not fits:
            raise UserError(
                f"field {self.name!r} is {value.dtype} {list(value.shape)} in one row where {self.dtype} "
                f"{list(self.shape)} is declared: write all rows alike, or declare the axis as None"
            )
        head = np.asarray(value.shape, "<i4").tobytes() if None in self.shape else b""
        return head + value.astype(np.dtype(self.dtype).newbyteorder("<"), copy=False).tobytes()

    def _unpack_all(self, column: pa.BinaryArray) -> np.ndarray:
        """Arrays of a fixed shape, copied once, straight out of the column's memory."""
        dtype, each = np.dtype(self.dtype).newbyteorder("<"), math.prod(self.shape)
        size = each * dtype.itemsize
        _, ends, values = column.buffers()
        if not len(column) or values is None:  # no rows, or nothing in any of them
            offsets = np.zeros(len(column) + 1, np.int32)
        else:
            offsets = np.frombuffer(ends, np.int32, len(column) + 1, 4 * column.offset)
        sizes = np.diff(offsets)
        if size and not column.null_count and (sizes == size).all():
            found = np.frombuffer(values, dtype, len(column) * each, int(offsets[0])) if len(column) else np.empty(0)
            return found.reshape(len(column), *self.shape).astype(self.dtype)
        here = column.is_valid().to_numpy(zero_copy_only=False)
        wrong = sizes[here & (sizes != size)]
        if len(wrong):
            raise self._unfit(int(wrong[0]))
        rows = np.zeros((len(column), *self.shape), self.dtype)
        for row in np.flatnonzero(here) if size else ():
            rows[row] = np.frombuffer(values, dtype, each, int(offsets[row])).reshape(self.shape)
        return rows

    def _unfit(self, size: int) -> UserError:
        return UserError(
            f"field {self.name!r}: {size} bytes are no {self.dtype} {list(self.shape)}: the file was not written for"
            " this schema, or is damaged"
        )

    def _unpack(self, stored: bytes) -> np.ndarray:
        """An array of varying shape."""
        head = 4 * len(self.shape)
        shape = tuple(np.frombuffer(stored[:head], "<i4").tolist()) if len(stored) >= head else (-1,)
        dtype = np.dtype(self.dtype).newbyteorder("<")
        if any(size < 0 for size in shape) or len(stored) != head + math.prod(shape) * dtype.itemsize:
            raise self._unfit(len(stored))
        return np.frombuffer(stored, dtype, offset=head).reshape(shape).astype(self.dtype, copy=False)


@dataclass(frozen=True)
class Schema:
    """The fields of a row, each named once."""

    fields: tuple[Field, ...]

    def __post_init__(self) -> None:
        """Refuses two fields of one name.

        Raises:
          UserError: Names it.
        """
        names = [field.name for field in self.fields]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"schema: the name {twice!r} is used twice: rename one of the fields")

    @property
    def names(self) -> tuple[str, ...]:
        """Names in their order."""
        return tuple(field.name for field in self.fields)

    @property
    def modalities(self) -> frozenset[str]:
        """Kinds of what a model can read."""
        return frozenset(field.kind for field in self.fields if field.kind in MODALITIES)

    @property
    def arrow(self) -> pa.Schema:
        """The same as an Arrow schema, whose metadata `from_arrow` reads back."""
        return pa.schema([field.arrow for field in self.fields])

    def select(self, names: Sequence[str]) -> "Schema":
        """Keeps some fields, in their order here.

        Args:
          names: Which.

        Returns:
          The smaller schema.

        Raises:
          UserError: A name is none of them.
        """
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise UserError(f"there is no column {unknown[0]!r}: choose among {', '.join(self.names)}")
        return Schema(tuple(field for field in self.fields if field.name in set(names)))

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> pa.RecordBatch:
        """Turns rows into Arrow.

        Args:
          rows: Values by name; a field that a row lacks is null.

        Returns:
          One column a field.

        Raises:
          UserError: A row has a name that is no field, or a value does not fit.
        """
        for row in rows:
            unknown = row.keys() - set(self.names)
            if unknown:
                raise UserError(f"a row has {sorted(unknown)[0]!r}, which the schema lacks: it has {self.names}")
        columns = [field.encode([row.get(field.name) for row in rows]) for field in self.fields]
        return pa.RecordBatch.from_arrays(columns, schema=self.arrow)

    def decode(self, batch: pa.RecordBatch | pa.Table) -> dict[str, Any]:
        """Turns Arrow back into a batch.

        Args:
          batch: Has at least the columns of this schema.

        Returns:
          By name, what `Field.decode` gives.

        Raises:
          UserError: A column is missing, or of another type.
        """
        found = {}
        for field in self.fields:
            if field.name not in batch.schema.names:
                raise UserError(f"column {field.name!r} is missing: there are {', '.join(batch.schema.names)}")
            column = batch.column(field.name)
            column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
            try:  # large strings and other dictionary indices hold the same values; a cast to the same type copies
                column = column if column.type == field.arrow.type else column.cast(field.arrow.type)
            except pa.ArrowException as error:
                raise UserError(f"column {field.name!r} is {column.type}, not {field.arrow.type}: {error}") from error
            found[field.name] = field.decode(column)
        return found


def from_arrow(schema: pa.Schema) -> Schema:
    """Reads the description back from a file, or guesses it for files that r1jax did not write.

    Args:
      schema: Of a Parquet file.

    Returns:
      The fields; columns of other origin are numbers, texts, categories (dictionaries) or bytes by their type.

    Raises:
      UserError: A column has a type that none of the kinds covers.
    """
    return Schema(tuple(_field(column) for column in schema))


def _field(column: pa.Field) -> Field:
    told = (column.metadata or {}).get(METADATA)
    if told is not None:
        kind, dtype, shape = told.decode().split(";")
        sizes = tuple(None if size == "*" else int(size) for size in shape.split(",") if size)
        return Field(column.name, kind, dtype, sizes)  # type: ignore[arg-type]
    kind = column.type
    if pa.types.is_dictionary(kind):
        return Field(column.name, "category")
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return Field(column.name, "text")
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return Field(column.name, "bytes")
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return Field(column.name, "number", str(np.dtype(kind.to_pandas_dtype())))
    raise UserError(f"column {column.name!r} is {kind}: r1jax reads numbers, strings, dictionaries and bytes")
