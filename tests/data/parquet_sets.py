"""Small data sets to write as Parquet, and what is asked of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from r1jax.data.card import Card
from r1jax.data.parquet import ParquetStore
from r1jax.data.schema import Field, Schema
from r1jax.data.shards import Origin, write_shards
from r1jax.errors import UserError

SCHEMA = Schema(
    (
        Field("case_id", "category"),
        Field("volume", "volume", "int16", (3, 4, 5)),
        Field("series", "series", "float32", (None, 2)),
        Field("text", "text"),
        Field("age", "number", "float32"),
        Field("target.size", "number", "int64"),
    )
)
ORIGIN = Origin("a set", "0" * 64, "a command")


def row(number: int) -> dict[str, Any]:
    draw = np.random.default_rng(number)
    return {
        "case_id": f"case {number % 7}",
        "volume": draw.integers(-1000, 400, (3, 4, 5)).astype(np.int16),
        "series": draw.random((number % 4, 2), np.float32),
        "text": None if number % 3 == 0 else f"文本 {number}",
        "age": None if number % 5 == 0 else np.float32(number),
        "target.size": number,
    }


def rows(total: int):
    def start(first: int) -> Iterator[dict[str, Any]]:
        return (row(number) for number in range(first, total))

    return start


def write(url: str | Path, total: int = 50, **options) -> Card:
    options = {"group_rows": 8, "shard_rows": 24} | options
    return write_shards(str(url), SCHEMA, rows(total), total, ORIGIN, **options)


def assert_rows(batch: pa.RecordBatch | pa.Table, numbers, schema: Schema = SCHEMA) -> None:
    """Compares stored rows with those that were written, by way of Arrow alone."""
    wanted = [{name: value for name, value in row(n).items() if name in schema.names} for n in numbers]
    left, right = schema.decode(batch), schema.decode(schema.encode(wanted))
    assert left.keys() == right.keys()
    for name, values in right.items():
        pairs = zip(left[name], values, strict=True) if isinstance(values, list) else [(left[name], values)]
        for one, other in pairs:
            np.testing.assert_array_equal(one, other)


def refused(call, *words: str) -> str:
    """Checks that a call ends in a message of one sentence that holds all the words."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def read_everything(url: str | Path) -> pa.Table:
    store = ParquetStore.open(str(url))
    return pa.Table.from_batches(store.read_blocks(range(len(store.groups))))
