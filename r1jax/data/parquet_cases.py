"""Cases of the documented format (docs/data.md) in Parquet: written row by row, small columns read at once."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from r1jax.config import CacheConfig
from r1jax.data.filesystem import is_remote
from r1jax.data.folder_cases import Cases, check_cases, stand_in
from r1jax.data.folder_files import PICTURES, RANK, TEXTS, Column, bare_name
from r1jax.data.parquet import SUFFIX, ParquetStore
from r1jax.data.schema import Field, Schema
from r1jax.data.tiered import TieredStore
from r1jax.errors import UserError
from r1jax.tasks.medical.schema import RECORD_FIELDS

AT_A_TIME = 16


@dataclass(frozen=True, eq=False)
class StoredPictures:
    """Pictures in Parquet files, read when they are asked for; see `Pictures`.

    Attributes:
      layout: dtype and shape of each.
      schema: Their columns.
      rows: Reads them.
      optional: Pictures that some cases lack, as `has_...` says.
    """

    layout: dict[str, tuple[str, tuple[int, ...]]]
    schema: Schema
    rows: TieredStore
    optional: frozenset[str]

    def read(self, rows: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        """See `Pictures`."""
        if not self.layout:
            return {}
        table = self.rows.read_rows(rows)
        for name in RANK:
            if name in self.layout and name not in self.optional and table.column(name).null_count:
                missing = rows[np.flatnonzero(table.column(name).is_null().to_numpy())[0]]
                raise UserError(f"row {missing} has no {name}: fill it in, or add a column has_{name}")
        return self.schema.decode(table)


def is_parquet(path: str | Path) -> bool:
    """Tells Parquet files from a folder of `.npz` files.

    Args:
      path: A URL is always one of Parquet files.

    Returns:
      Whether to read Parquet files there.

    Raises:
      UserError: The folder holds both.
    """
    text = str(path)
    if is_remote(text) or text.startswith("file:") or text.endswith(SUFFIX):
        return True
    folder = Path(path)
    try:
        here = {entry.suffix.lower() for entry in folder.iterdir()} if folder.is_dir() else set()
    except OSError:  # reading it says why
        return False
    if ".npz" not in here:
        return any(folder.rglob(f"*{SUFFIX}"))
    if SUFFIX in here:
        raise UserError(f"{folder} holds .npz and {SUFFIX} files: which are the cases? Give each a folder of its own")
    return False


def open_cases(url: str) -> ParquetStore:
    """Opens the columns that the format knows.

    Args:
      url: Of the Parquet files.

    Returns:
      The store.

    Raises:
      UserError: There are none, or they are damaged.
    """
    return ParquetStore.open(url, lambda label: bare_name(label) is not None)


def read_parquet_cases(url: str, cache: CacheConfig) -> tuple[Cases, list[str], tuple[str, ...], str]:
    """Reads all but the pictures, and checks it as a folder's is.

    Pixels were checked when they were written; since then the sums of the files vouch for them.

    Args:
      url: Of the Parquet files.
      cache: Tiers that the pictures are read through.

    Returns:
      The cases, the labels that the format does not know, remarks for people, the fingerprint.

    Raises:
      UserError: Something is not as docs/data.md says.
    """
    store = open_cases(url)
    names = store.schema.names
    labels: dict[str, str] = {}
    for label in names:
        name = bare_name(label)
        if name in labels:
            raise UserError(f"{url} holds {name} twice, as {labels[name]!r} and {label!r}: keep one")
        labels[name] = label
    unknown = [label for label in store.parts[0].metadata.schema.to_arrow_schema().names if label not in names]
    if not labels:
        raise UserError(
            f"{url} has none of the columns `image`, `volume` or record fields, but {', '.join(unknown)}: name its"
            " columns as docs/data.md says"
        )
    if len(store) == 0:
        raise UserError(f"{url} holds no cases")
    fields = {name: store.schema.select([label]).fields[0] for name, label in labels.items()}
    places = _places(store)
    small = store.read_columns([label for name, label in labels.items() if name not in PICTURES])
    columns = {}
    for name, label in labels.items():
        values = _picture(fields[name], name, len(store), places[0][0]) if name in PICTURES else small[label]
        columns[name] = _checked(Column(label, np.asarray(values), places), name)
    cases = check_cases(columns, len(store))
    pictures = store.select([labels[name] for name in PICTURES if name in labels])
    optional = frozenset(name for name in RANK if f"has_{name}" in labels)
    stored = StoredPictures(cases.pictures.layout, pictures.schema, TieredStore(pictures, cache), optional)
    return dataclasses.replace(cases, pictures=stored), unknown, store.remarks, store.fingerprint


def _places(store: ParquetStore) -> tuple[tuple[str, int], ...]:
    """Which file holds the rows from which row on."""
    firsts = np.cumsum([0, *(sum(part.rows) for part in store.parts)])
    return tuple((part.name, int(first)) for part, first in zip(store.parts, firsts, strict=False))


def _picture(field: Field, name: str, total: int, file: str) -> np.ndarray:
    """A stand-in for pixels, which stay where they are."""
    good = field.dtype and None not in field.shape and len(field.shape) > 0
    if name in RANK:
        good = good and field.dtype in ("uint8", "int16") and len(field.shape) == RANK[name] - 1
    if not good:
        told = " ".join(filter(None, [field.kind, field.dtype, str(list(field.shape)) if field.shape else ""]))
        raise UserError(
            f"column {field.name!r} of {file} is {told}: pictures need their type and shape beside them, as r1jax data"
            " convert writes them"
        )
    return stand_in(field.dtype, (total, *field.shape))


def _checked(column: Column, name: str) -> Column:
    """Refuses types that the format does not have, as it is done with arrays."""
    wanted = "U" if name in TEXTS else "biuf"
    kind = column.values.dtype.kind
    if kind not in wanted and not (name in TEXTS and kind in "iu"):
        what = "strings or whole numbers" if name in TEXTS else "numbers"
        raise UserError(f"{column.where()} is {column.values.dtype}: {what} are needed")
    return column


def stored_schema(cases: Cases) -> Schema:
    """Names the columns that hold everything that cases say.

    Args:
      cases: Of a folder.

    Returns:
      The fields, under the names of docs/data.md.
    """
    fields = [Field("case_id", "category")]
    fields += [Field("group", "category")] if any(cases.groups) else []
    fields += [Field("split", "category")] if any(cases.marks) else []
    for name, (dtype, shape) in cases.pictures.layout.items():
        fields.append(Field(name, name if name in RANK else "number", dtype, shape))  # type: ignore[arg-type]
        if name in RANK:
            fields.append(Field(f"{name}_spacing", "number", "float32", (len(shape),)))
    fields += [Field(name, "number", "bool") for name in cases.has]
    fields += [Field(field.name, "number", "float32") for field in RECORD_FIELDS] if cases.table is not None else []
    fields += [Field("text", "text")] if cases.text is not None else []
    for name, values in cases.targets.items():
        if not np.isnan(values).all():
            fields.append(Field(name, "number", "float32", values.shape[1:]))
    return Schema(tuple(fields))


def stored_rows(cases: Cases, start: int) -> Iterator[Mapping[str, Any]]:
    """Gives cases as rows of `stored_schema`.

    Args:
      cases: Of a folder.
      start: First case.

    Yields:
      Values by name; None where nothing is known.
    """
    names = stored_schema(cases).names
    total = len(cases.case_id)
    for first in range(start, total, AT_A_TIME):
        numbers = np.arange(first, min(first + AT_A_TIME, total))
        pictures = cases.pictures.read(numbers)
        for place, row in enumerate(numbers.tolist()):
            values: dict[str, Any] = {name: pixels[place] for name, pixels in pictures.items()}
            values |= {f"{name}_spacing": spacing[row] for name, spacing in cases.spacing.items()}
            values |= {name: bool(present[row]) for name, present in cases.has.items()}
            if cases.table is not None:
                record = zip(RECORD_FIELDS, cases.table[row], strict=True)
                values |= {field.name: _known(value) for field, value in record}
            values |= {name: _known(known[row]) for name, known in cases.targets.items() if name in names}
            words = {"case_id": cases.case_id, "group": cases.groups, "split": cases.marks, "text": cases.text}
            values |= {name: words[name][row] or None for name in words if name in names}
            yield values


def _known(value: np.ndarray | np.floating) -> np.ndarray | np.floating | None:
    """A number, or None where it is NaN; vectors stay as they are."""
    return None if value.ndim == 0 and np.isnan(value) else value
