"""Stored values come back as they were or not at all: damaged, cut, foreign and mixed-up ones are refused."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.data.cache_values import HEAD, BlockCodec, dataset_name, key_of, seal, unseal
from r1jax.data.schema import Field, Schema
from r1jax.errors import UserError
from tests.data.stores import SCHEMA, MemoryStore, same

STORE = MemoryStore([5, 3])
CODEC = BlockCodec(SCHEMA)
KEY = key_of(dataset_name(STORE), "group", 0)
VALUE = CODEC.encode(KEY, CODEC.normalize(STORE.read_blocks([0])[0]))


def test_a_block_comes_back_whole():
    batch = CODEC.decode(KEY, VALUE, 5)
    same(CODEC.finish(pa.Table.from_batches([batch])), STORE, range(5))


def test_a_slice_is_stored_without_the_rest_of_its_block():
    batch = CODEC.normalize(STORE.read_blocks([0])[0])
    row = CODEC.encode(KEY, batch.slice(3, 1))
    same(CODEC.finish(pa.Table.from_batches([CODEC.decode(KEY, row, 1)])), STORE, [3])
    assert len(row) < len(VALUE)


def test_no_flipped_bit_is_believed():
    rng = np.random.default_rng(0)
    for place in rng.choice(8 * len(VALUE), 1000, replace=False):
        damaged = bytearray(VALUE)
        damaged[place // 8] ^= 1 << place % 8
        assert CODEC.decode(KEY, bytes(damaged), 5) is None


@given(st.integers(0, len(VALUE) - 1), st.binary(max_size=40))
def test_cut_lengthened_and_overwritten_values_are_refused(place, noise):
    assert CODEC.decode(KEY, VALUE[:place], 5) is None
    assert CODEC.decode(KEY, noise, 5) is None
    if noise:
        assert CODEC.decode(KEY, VALUE + noise, 5) is None
        damaged = VALUE[:place] + noise + VALUE[place + len(noise) :]
        assert damaged == VALUE or CODEC.decode(KEY, damaged, 5) is None


def test_the_value_of_another_key_is_refused():
    for dataset, unit, number in (
        (dataset_name(STORE), "group", 1),
        (dataset_name(STORE), "row", 0),
        ("x", "group", 0),
    ):
        assert CODEC.decode(key_of(dataset, unit, number), VALUE, 5) is None


@given(st.binary(max_size=64), st.binary(max_size=300))
def test_sealed_bytes_open_with_their_key(key, payload):
    assert bytes(unseal(key, seal(key, payload))) == payload
    assert unseal(key + b"x", seal(key, payload)) is None


def test_sealed_rubbish_and_other_row_counts_are_refused():
    assert CODEC.decode(KEY, seal(KEY, b"not an Arrow message"), 5) is None
    assert CODEC.decode(KEY, seal(KEY, b""), 5) is None
    assert CODEC.decode(KEY, VALUE, 4) is None
    other = Schema((Field("id", "text"),))
    strange = other.encode([{"id": "a"}] * 5).serialize().to_pybytes()
    assert CODEC.decode(KEY, seal(KEY, strange), 5) is None
    assert HEAD.size % 8 == 0


def test_the_name_follows_rows_columns_and_cuts():
    other = MemoryStore([5, 3], fingerprint="5eee")
    fewer = MemoryStore([5, 3])
    fewer.schema = SCHEMA.select(["id"])
    names = [dataset_name(store) for store in (STORE, other, fewer, MemoryStore([4, 4]))]
    assert len(set(names)) == 4
    assert dataset_name(MemoryStore([5, 3])) == names[0]
    odd = MemoryStore([1], fingerprint="a:b\n")
    assert ":" not in dataset_name(odd)


def test_columns_of_other_stored_types_are_brought_into_one_form():
    batch = STORE.read_blocks([1])[0]
    changed = batch.set_column(1, "word", batch.column("word").cast(pa.large_string()))
    changed = changed.set_column(2, "kind", batch.column("kind").cast(pa.string()))
    changed = changed.set_column(0, "id", batch.column("id").cast(pa.int16()))
    assert CODEC.normalize(changed).equals(CODEC.normalize(batch))


def test_columns_that_do_not_fit_are_named():
    batch = STORE.read_blocks([1])[0]
    with pytest.raises(UserError, match="'kind' is missing"):
        CODEC.normalize(batch.drop_columns(["kind"]))
    with pytest.raises(UserError, match="'id' is string, not int64"):
        CODEC.normalize(batch.set_column(0, "id", pa.array(["a", "b", "c"])))
