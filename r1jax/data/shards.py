"""Writes rows as Parquet files under any URL: each file seen whole or not at all, and the same bytes after a crash."""

import base64
import dataclasses
import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from r1jax import __version__
from r1jax.data.card import CARD, UNFINISHED, Card, Shard, read_card
from r1jax.data.files import Files
from r1jax.data.parquet_files import MAGIC, chunk_range
from r1jax.data.schema import Field, Schema
from r1jax.data.source import Source
from r1jax.errors import FULL, UserError

GROUP_BYTES = 2**20
"""Wanted size of a row group before compression: one random row costs the reading of its group."""
GROUP_ROWS = 512
SHARD_BYTES = 2**27
"""Wanted size of a file before compression; one file is held in memory while it is written."""
SAMPLE = 64
"""Rows whose size decides on that of row groups."""
AT_A_TIME = 16
PAGE = "README.md"
Rows = Callable[[int], Iterator[Mapping[str, Any]]]
"""Gives the rows of a data set from a number on: after a crash those that are written are not asked for again."""


@dataclass(frozen=True)
class Origin:
    """Where rows come from.

    Attributes:
      name: For people.
      fingerprint: sha256 (hex) over what defines them.
      command: That writes them.
    """

    name: str
    fingerprint: str
    command: str


def rows_of(source: Source) -> Rows:
    """Gives the rows of any source.

    Args:
      source: Its schema names what is taken of each batch.

    Returns:
      Rows by name, in order.
    """

    def rows(start: int) -> Iterator[Mapping[str, Any]]:
        for first in range(start, len(source), AT_A_TIME):
            batch = source.read_batch(np.arange(first, min(first + AT_A_TIME, len(source))))
            columns = [batch[name] for name in source.schema.names]
            for values in zip(*columns, strict=True):
                pairs = zip(source.schema.fields, values, strict=True)
                yield {field.name: _plain(field, value) for field, value in pairs}

    return rows


def _plain(field: Field, value: Any) -> Any:
    """None where a batch marks a single number as missing: a column of integers has no NaN."""
    if not field.dtype or field.shape or value is None:
        return value
    return None if np.isnan(value) else np.dtype(field.dtype).type(value)


def write_shards(
    url: str,
    schema: Schema,
    rows: Rows,
    total: int,
    origin: Origin,
    *,
    group_rows: int | None = None,
    shard_rows: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Card:
    """Writes `part-00000.parquet` and so on, then `dataset.json` and a README.md, all of them safe against crashes.

    Borders of files depend on the rows alone. What an earlier call that was cut off has completed is kept.

    Args:
      url: Folder, as `filesystem.open_filesystem` takes it; made if absent.
      schema: Of the rows.
      rows: Gives them.
      total: How many there are.
      origin: Stored in the card; a folder half written from another origin is refused.
      group_rows: Rows of a row group; None takes as many as make about `GROUP_BYTES`, at most `GROUP_ROWS`.
      shard_rows: Rows of a file, rounded up to whole row groups; None takes about `SHARD_BYTES`.
      advance: Called with the number of rows that are safely written since the last call.

    Returns:
      The card.

    Raises:
      UserError: The folder holds something else, cannot be written or is full, or rows do not fit the schema.
    """
    files = Files(url)
    if total == 0:
        raise UserError(f"{origin.name} has no rows: there is nothing to write")
    group_rows, shard_rows = _sizes(schema, rows, group_rows, shard_rows)
    plan = Card(schema, total, group_rows, shard_rows, origin.name, origin.fingerprint, origin.command, _versions())
    plan, shards = _done(files, plan)
    if len(shards) == -(-total // shard_rows) and files.find(CARD) is not None:
        files.remove(UNFINISHED)
        advance(total)
        return dataclasses.replace(plan, shards=shards)
    done = sum(shard.rows for shard in shards)
    advance(done)
    supply = rows(done)
    try:
        if not shards:  # from the first file on, nobody takes the folder for a whole data set
            files.publish(UNFINISHED, plan.to_json())
        for start in range(done, total, shard_rows):
            name, count = f"part-{start // shard_rows:05}.parquet", min(shard_rows, total - start)
            shard, content = _shard(name, schema, itertools.islice(supply, count), group_rows)
            if shard.rows != count:
                raise UserError(
                    f"{origin.name} ended after {start + shard.rows} of {total} rows: nothing may change it"
                )
            files.publish(name, content)
            shards += (shard,)
            files.publish(UNFINISHED, dataclasses.replace(plan, shards=shards).to_json())
            advance(count)
        card = dataclasses.replace(plan, shards=shards)
        files.publish(PAGE, card.describe().encode())
        files.publish(CARD, card.to_json())
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(
            f"{files.url} is full ({error.strerror}) after {len(shards)} of {-(-total // shard_rows)} files: make room,"
            " and run the same command again; it goes on from there"
        ) from error
    files.remove(UNFINISHED)
    return card


def _versions() -> dict[str, str]:
    return {"r1jax": __version__, "pyarrow": pa.__version__}


def _sizes(schema: Schema, rows: Rows, group_rows: int | None, shard_rows: int | None) -> tuple[int, int]:
    """Rows of a row group and of a file, from the size of the first rows."""
    sample = list(itertools.islice(rows(0), SAMPLE))
    each = max(schema.encode(sample).nbytes // len(sample), 1)
    group_rows = group_rows or min(max(round(GROUP_BYTES / each), 1), GROUP_ROWS)
    groups = max(-(-(shard_rows or SHARD_BYTES // each) // group_rows), 1)
    return group_rows, groups * group_rows


def _done(files: Files, plan: Card) -> tuple[Card, tuple[Shard, ...]]:
    """The plan with the command that began it, and the files that an earlier call has completed.

    Raises:
      UserError: The folder holds other files, or those of another origin.
    """
    sizes = {}
    if _exists(files):
        sizes = {item.name: item.size for item in files.listing() if item.name.endswith(".parquet")}
    card = read_card(files) or read_card(files, UNFINISHED)
    if card is None:
        if sizes:
            raise UserError(f"{files.url} holds other Parquet files ({next(iter(sizes))}): choose another folder")
        return plan, ()
    plan = dataclasses.replace(plan, command=card.command)
    if dataclasses.replace(card, shards=()) != plan:
        old, new = dataclasses.asdict(card), dataclasses.asdict(plan)
        name = next(name for name in new if name != "shards" and old[name] != new[name])
        raise UserError(
            f"{files.url} was begun with {name} {_short(old[name])}, now it is {_short(new[name])}: choose another"
            " folder, or empty this one"
        )
    for shard in card.shards:
        if sizes.get(shard.name) != shard.size:
            raise UserError(f"{files.url}/{shard.name} is missing or was changed: empty the folder and write it again")
    return plan, card.shards


def _exists(files: Files) -> bool:
    """Whether the folder is there."""
    filesystem, root = files.root
    return bool(files.ask("", [lambda: filesystem.get_file_info(root).type.value])[0])


def _short(value: Any) -> str:
    return text if len(text := str(value)) <= 80 else f"{text[:80]}..."


def _shard(name: str, schema: Schema, rows: Iterator[Mapping[str, Any]], group_rows: int) -> tuple[Shard, memoryview]:
    """Makes one file in memory, and sums over all of it."""
    sink = pa.BufferOutputStream()
    categories = [field.name for field in schema.fields if field.kind == "category"]
    count = 0
    with pq.ParquetWriter(
        sink,
        schema.arrow,
        compression="zstd",
        use_dictionary=categories,
        write_page_checksum=True,
        write_page_index=True,
        write_statistics=[field.name for field in schema.fields if not field.shape and field.kind != "bytes"],
    ) as writer:
        while group := list(itertools.islice(rows, group_rows)):
            writer.write_batch(schema.encode(group), row_group_size=group_rows)
            count += len(group)
    content = memoryview(sink.getvalue())
    metadata = pq.read_metadata(pa.BufferReader(content))
    sums = [
        [
            _crc(content, *chunk_range(metadata.row_group(group).column(column)))
            for column in range(metadata.num_columns)
        ]
        for group in range(metadata.num_row_groups)
    ]
    footer = bytes(content[-(int.from_bytes(content[-8:-4], "little") + 8) :])
    assert footer.endswith(MAGIC)
    shard = Shard(
        name=name,
        rows=count,
        groups=metadata.num_row_groups,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        footer=hashlib.sha256(footer).hexdigest(),
        chunks=base64.b64encode(np.array(sums, "<u4").tobytes()).decode(),
    )
    return shard, content


def _crc(content: memoryview, first: int, length: int) -> int:
    return zlib.crc32(content[first : first + length])
