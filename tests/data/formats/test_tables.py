"""Columns of a CSV get the type that all their cells allow, nothing is lost, and errors name line and column."""

import pickle

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.data.formats.tables import open_table
from r1jax.data.source import Source
from r1jax.errors import UserError


def table(tmp_path, text, **options):
    file = tmp_path / "table.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_table(file, **options)


def everything(source):
    return source.read_batch(np.arange(len(source)))


def kinds(source):
    return {field.name: (field.kind, field.dtype) for field in source.schema.fields[1:]}


def test_types_are_found_from_all_cells(tmp_path):
    rows = "".join(f"{i},{i / 2},{'ab'[i % 2]},note {i},{i if i else ''}\n" for i in range(1000))
    source = table(tmp_path, "whole,part,mark,note,gap\n" + rows + "7,x,a,last,1\n")
    assert isinstance(source, Source)
    assert kinds(source) == {
        "whole": ("number", "int64"),
        "part": ("text", ""),  # one cell of the last row is no number
        "mark": ("category", ""),
        "note": ("text", ""),
        "gap": ("number", "float64"),
    }
    batch = pickle.loads(pickle.dumps(source)).read_batch(np.array([1000, 0, 3]))
    assert batch["case_id"] == ["1000", "0", "3"] and batch["mark"] == ["a", "a", "b"]
    np.testing.assert_array_equal(batch["whole"], [7, 0, 3])
    np.testing.assert_array_equal(batch["gap"], [1.0, np.nan, 3.0])


NUMBERS = st.one_of(st.integers(-(2**63), 2**63 - 1).map(str), st.floats(allow_nan=False, width=32).map(repr))


@given(st.lists(st.tuples(NUMBERS, st.sampled_from(["red", "green", ""])), min_size=1, max_size=20))
def test_numbers_are_those_of_pandas_or_words(tmp_path_factory, rows):
    text = "n,c\n" + "".join(f"{number},{word}\n" for number, word in rows)
    folder = tmp_path_factory.mktemp("t")
    found = everything(table(folder, text, kinds={"c": "category"}))
    assert found["c"] == [word for _, word in rows]
    if isinstance(found["n"], list):  # words, where a float would lose digits
        assert found["n"] == [number for number, _ in rows]
        assert any(len(number.lstrip("-")) > 15 for number, _ in rows)
    else:
        want = pd.read_csv(folder / "table.csv")["n"].to_numpy()
        np.testing.assert_array_equal(found["n"], want)
        assert found["n"].dtype == want.dtype


@pytest.mark.parametrize(
    "cell", ["007", "0x1F", "12345678901234567890", "1e999", "1_000", "12 3", "9007199254740993.0"]
)
def test_codes_stay_words(tmp_path, cell):
    assert everything(table(tmp_path, f"a,b\n1,{cell}\n2,5\n"))["b"] == [cell, "5"]


def test_whole_numbers_with_a_gap_stay_exact(tmp_path):
    assert everything(table(tmp_path, "a,b\n9007199254740993,1\n,2\n"))["a"] == ["9007199254740993", ""]


def test_semicolons_bring_decimal_commas(tmp_path):
    np.testing.assert_array_equal(everything(table(tmp_path, "a;b\n1,5;x\n-2;x\n"))["a"], [1.5, -2.0])
    assert everything(table(tmp_path, "a;b\n1,5;x\n1.234;x\n"))["a"] == ["1,5", "1.234"]


def test_a_mark_of_the_encoding_and_a_column_without_name_are_read(tmp_path):
    source = table(tmp_path, b"\xef\xbb\xbf,b\r\n4,x\r\n")
    assert source.schema.names == ("case_id", "column_1", "b")


def test_a_column_names_the_rows(tmp_path):
    assert everything(table(tmp_path, "uid,b\n007,1\n8,2\n", case_id="uid"))["case_id"] == ["007", "8"]
    assert everything(table(tmp_path, "b,case_id\n1,q\n"))["case_id"] == ["q"]


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ('a,b\n"1\n",2\n\nx,2\n', {"kinds": {"a": "number"}}, "column 'a' in line 5"),
        ('a,b\n1,"x\ny"\n\n2,3,4\n', {}, "line 5 .* 3 cells but the header has 2"),
        ("a,b\n1\n", {}, "line 2 .* 1 cells"),
        ('a,b\n1,"x\n', {}, "cut short or has a quotation mark too many"),
        ("a,a\n1,2\n", {}, "'a' is there twice"),
        (b"a,b\n1,2\n3,\xff\n", {}, "line 3 .* UTF-8"),
        (b"a,b\n1,\0\n", {}, "line 2 .* zero byte"),
        ("", {}, "empty"),
        ("a,b\n", {}, "no cases"),
        ("a,b\n1,2\n1,3\n", {"case_id": "a"}, "lines 2 and 3 .* is '1'"),
        ("a,b\n1,2\n,3\n", {"case_id": "a"}, "line 3 .* is empty"),
        ("age,b\n1,2\n", {"kinds": {"agge": "text"}}, "did you mean 'age'"),
        ("age,b\n1,2\n", {"kinds": {"age": "float"}}, "choose among number"),
        ("case_id,b\n1,2\n", {"case_id": "b"}, "rename"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, text, options, said):
    with pytest.raises(UserError, match=said):
        table(tmp_path, text, **options)


def test_the_fingerprint_is_of_the_contents_and_the_reading(tmp_path):
    first = table(tmp_path, "a,b\n1,2\n").fingerprint
    (tmp_path / "copy").mkdir()
    assert table(tmp_path / "copy", "a,b\n1,2\n").fingerprint == first
    assert table(tmp_path, "a,b\n1,2\n", kinds={"a": "text"}).fingerprint != first
    assert table(tmp_path, "a,b\n1,3\n").fingerprint != first
