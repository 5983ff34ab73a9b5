"""Series are cut by unit and put in the order of time; nothing is lost between the file and float32."""

import pickle

import numpy as np
import pandas as pd
import pytest

from r1jax.data.formats.series import open_series
from r1jax.data.schema import Field
from r1jax.errors import UserError

ONE = """unit,t,site,s1,s2
b,3,north,1.5,10
a,1,south,2.5,
b,1,north,3.5,30
a,2,south,,50
b,2,north,5.5,60
"""


def write(tmp_path, text=ONE, name="x.csv"):
    (tmp_path / name).write_text(text)
    return tmp_path / name


def everything(source):
    return source.read_batch(np.arange(len(source)))


def test_one_file_is_cut_by_unit(tmp_path):
    source = pickle.loads(pickle.dumps(open_series(write(tmp_path), time="t", labels=["site"])))
    assert source.schema.fields == (
        Field("case_id", "category"),
        Field("site", "category") if source.schema.fields[1].kind == "category" else Field("site", "text"),
        Field("series", "series", "float32", (None, 2)),
        Field("time", "series", "float64", (None,)),
    )
    assert source.channels == {"series": ("s1", "s2")}
    batch = everything(source)
    assert batch["case_id"] == ["b", "a"] and batch["site"] == ["north", "south"]
    table = pd.read_csv(tmp_path / "x.csv").sort_values("t")
    for unit, values, times in zip(batch["case_id"], batch["series"], batch["time"], strict=True):
        want = table[table.unit == unit]
        np.testing.assert_array_equal(values, want[["s1", "s2"]].to_numpy(np.float32))
        np.testing.assert_array_equal(times, want["t"])


def test_without_time_the_order_of_the_file_counts(tmp_path):
    batch = everything(open_series(write(tmp_path), unit="unit", channels=["s2"]))
    np.testing.assert_array_equal(batch["series"][0], [[10], [30], [60]])


def test_one_file_a_unit(tmp_path):
    write(tmp_path, "time,p,q\n2024-03-01 00:00:01,1,2\n2024-03-01 00:00:00.5,3,\n", "b.csv")
    write(tmp_path, "q,time,p\n7,2024-03-02T00:00:00,8\n", "a.csv")
    source = pickle.loads(pickle.dumps(open_series(tmp_path, time="time")))
    assert source.channels == {"series": ("q", "p")}
    batch = everything(source)
    assert batch["case_id"] == ["a.csv", "b.csv"]
    np.testing.assert_array_equal(batch["series"][1], [[np.nan, 3], [2, 1]])
    start = pd.Timestamp("2024-03-01", tz="UTC").timestamp()
    np.testing.assert_array_equal(batch["time"][1], [start + 0.5, start + 1])


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("u,s\n1,2\n", {}, "no column unit or case_id"),
        ("unit,s\n1,2\n,3\n", {}, "line 3 .* is empty"),
        ("unit,s\n1,2\n1,x\n", {}, "column 's' in line 3 .* is 'x'"),
        ("unit,s\n1,2\n1,16777217\n", {}, "line 3 .* float32 cannot hold"),
        ("unit,s\n1,2\n1,1e39\n", {}, "line 3 .* float32 cannot hold"),
        ("unit,t,s\n1,1,2\n2,1,3\n1,1,4\n", {"time": "t"}, "lines 2 and 4 .* one time"),
        ("unit,t,s\n1,1,2\n2,noon,3\n", {"time": "t"}, "column 't' in line 3 .* is 'noon'"),
        ("unit,t,s\n1,1,2\n2,,3\n", {"time": "t"}, "column 't' in line 3 .* is ''"),
        ("unit,t,s\n1,2,2\n2,2024-01-01,3\n", {"time": "t"}, "mixes"),
        ("unit,l,s\n1,a,2\n2,b,3\n1,b,4\n", {"labels": ["l"]}, "column 'l' in line 4 .* differs"),
        ("unit,speed\n1,2\n", {"channels": ["sped"]}, "did you mean 'speed'"),
        ("unit\n1\n", {}, "no column of a sensor"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, text, options, said):
    with pytest.raises(UserError, match=said):
        open_series(write(tmp_path, text), **options)


def test_files_with_other_columns_are_named(tmp_path):
    write(tmp_path, "p,q\n1,2\n", "a.csv")
    write(tmp_path, "p,r\n1,2\n", "b.csv")
    source = open_series(tmp_path)
    with pytest.raises(UserError, match=r"b\.csv has no column 'q'"):
        everything(source)
    write(tmp_path, "p,q\n", "b.csv")
    with pytest.raises(UserError, match=r"b\.csv has no rows"):
        everything(open_series(tmp_path))
    with pytest.raises(UserError, match="one file only"):
        open_series(tmp_path, unit="p")
