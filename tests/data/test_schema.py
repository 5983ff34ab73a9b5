"""What goes into Arrow comes back as it was, also through a Parquet file; what does not fit is refused."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from r1jax.data.schema import Field, Schema, from_arrow
from r1jax.errors import UserError

DTYPES = st.sampled_from(["uint8", "int16", "int32", "int64", "float16", "float32", "float64", "bool"])


@st.composite
def columns(draw):
    """What defines a field, and values of it for three rows, some of them missing."""
    kind = draw(st.sampled_from(["volume", "image", "series", "audio", "number", "text", "category", "bytes"]))
    if kind in ("text", "category"):
        return ("x", kind), draw(st.lists(st.text(min_size=1), min_size=3, max_size=3))
    if kind == "bytes":
        return ("x", kind), draw(st.lists(st.none() | st.binary(), min_size=3, max_size=3))
    dtype = draw(DTYPES)
    rank = draw(st.integers(0, 3))
    if rank == 0:
        return ("x", kind, dtype), list(draw(hnp.arrays(dtype, 3)))
    shape = tuple(draw(st.none() | st.integers(0, 3)) for _ in range(rank))
    sizes = [tuple(draw(st.integers(0, 3)) if size is None else size for size in shape) for _ in range(3)]
    values = [draw(st.none() | hnp.arrays(dtype, size)) for size in sizes]
    return ("x", kind, dtype, shape), values


def through_parquet(batch):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_batches([batch]), file)
    return pq.read_table(io.BytesIO(file.getvalue()))


@given(columns())
def test_columns_come_back_as_they_were(column):
    definition, values = column
    field = Field(*definition)
    schema = Schema((field,))
    table = through_parquet(schema.encode([{"x": value} for value in values]))
    assert from_arrow(table.schema) == schema
    found = schema.decode(table)["x"]
    for value, back in zip(values, found, strict=True):
        if value is None:
            assert back is None or not np.any(back)
        elif field.dtype:
            assert np.asarray(back).dtype == field.dtype
            np.testing.assert_array_equal(back, value)
        else:
            assert back == value


def test_what_a_row_lacks_is_said_by_the_kind():
    schema = Schema(
        (
            Field("age", "number", "int16"),
            Field("male", "number", "bool"),
            Field("note", "text"),
            Field("scan", "image", "uint8", (1, 2)),
            Field("sound", "audio", "float32", (None,)),
        )
    )
    full = {"age": 7, "male": True, "note": "好", "scan": np.ones((1, 2), np.uint8), "sound": np.ones(2, np.float32)}
    found = schema.decode(through_parquet(schema.encode([full, {}])))
    np.testing.assert_array_equal(found["age"], [7.0, np.nan])
    np.testing.assert_array_equal(found["male"], [1.0, np.nan])
    assert found["note"] == ["好", ""]
    np.testing.assert_array_equal(found["scan"], [[[1, 1]], [[0, 0]]])
    assert found["sound"][0].tolist() == [1.0, 1.0] and found["sound"][1] is None


def test_files_of_others_are_described_by_their_types():
    table = pa.table(
        {
            "amount": pa.array([1.5], pa.float32()),
            "merchant": pa.array(["a"]).dictionary_encode(),
            "memo": pa.array(["b"], pa.large_string()),
            "scan": pa.array([b"c"]),
        }
    )
    schema = from_arrow(table.schema)
    assert [(field.kind, field.dtype) for field in schema.fields] == [
        ("number", "float32"),
        ("category", ""),
        ("text", ""),
        ("bytes", ""),
    ]
    assert schema.decode(table)["memo"] == ["b"] and schema.modalities == {"text"}
    with pytest.raises(UserError, match="column 'when' is timestamp"):
        from_arrow(pa.schema([("when", pa.timestamp("s"))]))


@pytest.mark.parametrize("dtype", ["bool", "int16", "float64"])
@pytest.mark.parametrize("missing", [(), (0,), (2, 4), range(6)])
def test_arrays_of_one_shape_are_read_wherever_a_column_begins_and_can_be_written_to(dtype, missing):
    field = Field("x", "image", dtype, (2, 3))
    rows = np.random.default_rng(0).integers(0, 2, (6, 2, 3)).astype(dtype)
    stored = field.encode([None if number in missing else row for number, row in enumerate(rows)])
    wanted = np.stack([np.zeros_like(row) if number in missing else row for number, row in enumerate(rows)])
    for first, last in ((0, 6), (1, 6), (3, 4), (2, 2)):
        found = field.decode(stored.slice(first, last - first))
        np.testing.assert_array_equal(found, wanted[first:last], strict=True)
        found[:] = 1
    np.testing.assert_array_equal(field.decode(stored), wanted)
    wrong = pa.array([b"", *stored.to_pylist()], pa.binary())
    with pytest.raises(UserError, match="0 bytes are no"):
        field.decode(wrong)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Field("x", "image"), "field 'x' .image. has dtype ''"),
        (lambda: Field("x", "number", "object"), "has dtype 'object'"),
        (lambda: Field("x", "category", "int32"), "only numbers have"),
        (lambda: Schema((Field("x", "text"), Field("x", "bytes"))), "'x' is used twice"),
        (lambda: Field("x", "image", "uint8", (2, 2)).encode([np.zeros((2, 3), np.uint8)]), r"uint8 \[2, 3\] in one"),
        (lambda: Field("x", "image", "uint8", (2,)).encode([np.zeros(2)]), "is float64"),
        (lambda: Field("x", "number", "int8").encode([300]), "field 'x' .number."),
        (lambda: Schema((Field("x", "text"),)).encode([{"y": "a"}]), "a row has 'y'"),
        (lambda: Schema((Field("x", "text"),)).select(["y"]), "no column 'y': choose among x"),
        (lambda: Schema((Field("x", "text"),)).decode(pa.table({"y": ["a"]})), "column 'x' is missing: there are y"),
        (lambda: Schema((Field("x", "number", "int8"),)).decode(pa.table({"x": ["a"]})), "column 'x' is string"),
        (lambda: Field("x", "image", "uint8", (4,)).decode(pa.array([b"abc"])), "3 bytes are no uint8 .4."),
        (lambda: Field("x", "image", "uint8", (None,)).decode(pa.array([b"\xff\xff\xff\xffabc"])), "are no uint8"),
        (lambda: Field("x", "image", "uint8", (None,)).decode(pa.array([b"a"])), "are no uint8"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_some_columns_can_be_chosen():
    schema = Schema((Field("x", "text"), Field("y", "number", "int8"), Field("z", "bytes")))
    assert schema.select(["z", "x"]).names == ("x", "z")
