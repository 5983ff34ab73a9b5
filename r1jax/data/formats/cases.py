"""The source of all formats: columns known since it was opened, and a function that reads the rest of a case."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from r1jax.data.formats.files import fingerprint
from r1jax.data.schema import Field, Schema
from r1jax.errors import UserError

CASE_ID = Field("case_id", "category")


@dataclass(frozen=True, eq=False)
class FileCases:
    """Cases of a format; a `Source` that may be pickled and read from several threads.

    Attributes:
      name: What the cases are, for people.
      fingerprint: sha256 (hex) over the files and how they are read.
      schema: What `read_batch` gives.
      known: Columns known since opening, one row a case; `case_id` is the first of them.
      read: Reads the other fields of the case with this number; None where all are known.
      channels: Names along the last axis of a field, where they have some.
    """

    name: str
    fingerprint: str
    schema: Schema
    known: pa.Table = field(repr=False)
    read: Callable[[int], Mapping[str, Any]] | None = field(default=None, repr=False)
    channels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.known.num_rows

    def read_batch(self, indices: Int[np.ndarray, " B"]) -> dict[str, Any]:
        """Reads raw cases.

        Args:
          indices: Which cases, 0 <= index < len(self), in any order.

        Returns:
          By the names of the schema: strings; [B] numbers; [B, ...] arrays, or a list of B arrays where their shapes
          may differ; lists of bytes.

        Raises:
          UserError: A file is broken, or is not what it was when the source was opened.
        """
        known = self.schema.select(self.known.schema.names).decode(self.known.take(pa.array(indices)))
        if self.read is None:
            return known
        rows = [self.read(int(index)) for index in indices]
        rest = {
            field.name: self._stack(field, [row[field.name] for row in rows], known["case_id"])
            for field in self.schema.fields
            if field.name not in known
        }
        return {name: known[name] if name in known else rest[name] for name in self.schema.names}

    def _stack(self, field: Field, values: Sequence[Any], case_id: Sequence[str]) -> list[Any] | np.ndarray:
        """Holds what was read against the schema, and puts it together as `Field.decode` does."""
        if not field.dtype:  # words and bytes
            return list(values)
        for value, case in zip(values, case_id, strict=True):
            fits = value.ndim == len(field.shape) and all(
                want in (None, size) for want, size in zip(field.shape, value.shape, strict=True)
            )
            if value.dtype != np.dtype(field.dtype) or not fits:
                raise UserError(
                    f"case {case!r} of {self.name} now has {field.name!r} as {value.dtype} {list(value.shape)}, not "
                    f"{field.dtype} {list(field.shape)}: its file has changed, open the folder again"
                )
        if None in field.shape:
            return list(values)
        sizes = tuple(size for size in field.shape if size is not None)
        return np.stack(values) if values else np.zeros((0, *sizes), field.dtype)


def file_cases(
    root: Path,
    files: Sequence[str],
    what: str,
    known: Sequence[tuple[Field, Sequence[Any] | pa.Array | pa.ChunkedArray]],
    rest: Sequence[Field] = (),
    read: Callable[[int], Mapping[str, Any]] | None = None,
    channels: Mapping[str, tuple[str, ...]] | None = None,
) -> FileCases:
    """Puts a source together.

    Args:
      root: Folder of the data set.
      files: All files that are read, relative to it.
      what: Format and way of reading, for the name and the fingerprint.
      known: Fields and their values, one a case; `case_id` first.
      rest: Fields that `read` gives.
      read: Reads the case with this number.
      channels: Names along the last axis of a field.

    Returns:
      The source.

    Raises:
      UserError: Two cases have one id, two fields have one name, or there is no case.
    """
    schema = Schema((*(field for field, _ in known), *rest))
    columns = [
        values.cast(field.arrow.type) if isinstance(values, pa.Array | pa.ChunkedArray) else field.encode(values)
        for field, values in known
    ]
    table = pa.table(columns, schema=pa.schema([field.arrow for field, _ in known]))
    if table.num_rows == 0:
        raise UserError(f"{root / files[0] if len(files) == 1 else root} has no cases: give at least one")
    seen: set[str] = set()
    for key in table.column(0).to_pylist():
        if key is None or key in seen:
            raise UserError(f"{root}: case_id {key!r} is there twice or empty: give each case an id of its own")
        seen.add(key)
    channels = channels or {}
    facts = f"{what}\n{[(f.name, f.kind, f.dtype, f.shape) for f in schema.fields]}\n{sorted(channels.items())}"
    mark, remark = fingerprint(root, files, facts)
    name = root.name if len(files) != 1 else files[0]
    return FileCases(f"{name}, {what}: {table.num_rows} cases{remark}", mark, schema, table, read, channels)
