"""Streams of payments from files: formats, columns of any name, and every error with its row."""

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from r1jax.data import transaction_files
from r1jax.data.filesystem import open_filesystem
from r1jax.data.transaction_files import read_transactions
from r1jax.data.transactions import joined
from r1jax.errors import UserError

HEAD = "TRANSACTION_ID,TX_DATETIME,CUSTOMER_ID,TERMINAL_ID,TX_AMOUNT,TX_FRAUD"
ROWS = (
    "a,2018-04-01 00:00:31,596,3156,57.16,0",
    "b,2018-04-01 00:00:31,4961,3412,81.51,1",
    "c,2018-04-02 23:59:59,596,3412,0,",
)


def write(folder, rows=ROWS, head=HEAD, name="payments.csv"):
    path = folder / name
    path.write_text("\n".join([head, *rows]) + "\n", "utf-8")
    return str(path)


def with_cell(row, column, cell):
    """The rows of `ROWS` with one cell changed."""
    cells = [line.split(",") for line in ROWS]
    cells[row][HEAD.split(",").index(column)] = cell
    return [",".join(line) for line in cells]


def test_a_csv_is_read(tmp_path):
    table = read_transactions(write(tmp_path))
    assert table.ids.to_pylist() == ["a", "b", "c"]
    np.testing.assert_array_equal(table.seconds, [1522540831, 1522540831, 1522713599])
    assert table.customers.take(pa.array(table.customer)).to_pylist() == ["596", "4961", "596"]
    assert table.terminals.take(pa.array(table.terminal)).to_pylist() == ["3156", "3412", "3412"]
    np.testing.assert_array_equal(table.amount, np.array([57.16, 81.51, 0], np.float32))
    np.testing.assert_array_equal(table.fraud, [0, 1, np.nan])
    assert table.scenario is None and table.text is None


@pytest.mark.parametrize("kind", ["timestamp", "zoned", "seconds"])
def test_parquet_of_any_type_of_time_gives_the_same(tmp_path, kind):
    cells = csv.read_csv(write(tmp_path))
    text = cells.column("TX_DATETIME").cast(pa.timestamp("us"))
    time = {
        "timestamp": text,
        "zoned": text.cast(pa.timestamp("ns", "Asia/Shanghai")),
        "seconds": text.cast(pa.timestamp("s")).cast(pa.int64()),
    }[kind]
    cells = cells.set_column(1, "TX_DATETIME", time)
    parquet.write_table(cells, tmp_path / "payments.parquet")
    a, b = (read_transactions(str(tmp_path / name)) for name in ("payments.csv", "payments.parquet"))
    assert a.digest() == b.digest()


def test_columns_may_have_any_names(tmp_path):
    head = "no,booked,card,shop,eur,chargeback,memo,colour"
    rows = ["1,2018-04-01T10:00:00Z,x,y,3.5,1,急单,red", "2,2018-04-01T12:00:00+02:00,x,z,3.5,0,,blue"]
    pairs = ("id=no", "time=booked", "customer=card", "terminal=shop", "amount=eur", "fraud=chargeback", "text=memo")
    table = read_transactions(write(tmp_path, rows, head), pairs)
    np.testing.assert_array_equal(np.diff(table.seconds), [0])
    assert table.text.to_pylist() == ["急单", ""] and table.fraud.tolist() == [1, 0]


def test_files_of_a_folder_follow_each_other_by_name(tmp_path):
    write(tmp_path, ROWS[2:], name="2018-04-02.csv")
    write(tmp_path, ROWS[:2], name="2018-04-01.csv")
    assert read_transactions(str(tmp_path)).ids.to_pylist() == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("row", "column", "cell", "message"),
    [
        (2, "TX_DATETIME", "2018-03-31 00:00:00", "row 3: TX_DATETIME is '2018-03-31T00:00:00', but the row above"),
        (2, "TX_DATETIME", "yesterday", "row 3: TX_DATETIME is 'yesterday', but it must be a time such as"),
        (1, "TX_DATETIME", "", "row 2: TX_DATETIME is '', but it must be a time"),
        (1, "TRANSACTION_ID", "a", "row 2: TRANSACTION_ID is 'a', but a row above has that name"),
        (0, "TRANSACTION_ID", "", "row 1: TRANSACTION_ID is '', but it must not be empty"),
        (1, "CUSTOMER_ID", " ", "row 2: CUSTOMER_ID is ' ', but it must not be empty"),
        (1, "TERMINAL_ID", "", "row 2: TERMINAL_ID is '', but it must not be empty"),
        (2, "TX_AMOUNT", "-3", "row 3: TX_AMOUNT is -3.0, but it must not be negative"),
        (0, "TX_AMOUNT", "nan", "row 1: TX_AMOUNT is nan, but it must be a finite number"),
        (0, "TX_AMOUNT", "", "row 1: TX_AMOUNT is nan, but it must be a finite number"),
        (0, "TX_AMOUNT", "1e12", "row 1: TX_AMOUNT is 1000000000000.0, but it must be below"),
        (0, "TX_AMOUNT", "a lot", "row 1: TX_AMOUNT is 'a lot', but it must be a number"),
        (1, "CUSTOMER_ID", "\x01", r"row 2: CUSTOMER_ID is '\\x01', but it must not be empty"),
        (
            1,
            "TX_DATETIME",
            "2018-04-01T00:00:31Z",
            "row 2: TX_DATETIME is '2018-04-01T00:00:31Z', which names a zone, unlike",
        ),
        (
            2,
            "TX_DATETIME",
            "2218-04-02 00:00:00",
            "row 3: TX_DATETIME is 7833974400, but times must lie from 1900 to 2199",
        ),
        (1, "TX_FRAUD", "2", "row 2: TX_FRAUD is 2.0, but it must be 1 .fraud., 0 .genuine. or empty"),
    ],
)
def test_a_wrong_cell_is_named_with_its_row_and_value(tmp_path, row, column, cell, message):
    with pytest.raises(UserError, match=message):
        read_transactions(write(tmp_path, with_cell(row, column, cell)))


@pytest.mark.parametrize(
    ("head", "pairs", "message"),
    [
        (
            HEAD.replace("TX_AMOUNT", "TX_AMOUNTS"),
            (),
            "no column 'TX_AMOUNT' .did you mean 'TX_AMOUNTS'.. for the amount",
        ),
        (HEAD, ("fraud=CHARGEBACK",), "no column 'CHARGEBACK' for the fraud"),
        (HEAD, ("customer=TERMINAL_ID",), "'TERMINAL_ID' for the customer, but it is the terminal already"),
        (HEAD, ("amuont=X",), "has 'amuont=X' .did you mean 'amount'.."),
        (HEAD, ("TX_AMOUNT",), "write WHAT=COLUMN"),
    ],
)
def test_a_column_that_is_not_there_is_named_with_the_nearest(tmp_path, head, pairs, message):
    with pytest.raises(UserError, match=message):
        read_transactions(write(tmp_path, head=head), pairs)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="is not here"):
        read_transactions(str(tmp_path / "nothing.csv"))
    with pytest.raises(UserError, match="holds no .csv or .parquet file"):
        read_transactions(str(tmp_path))
    with pytest.raises(UserError, match="no transaction in it"):
        read_transactions(write(tmp_path, rows=[]))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="broken.parquet cannot be read"):
        read_transactions(str(tmp_path / "broken.parquet"))


def test_a_later_stream_is_joined_to_its_history(tmp_path):
    earlier = read_transactions(write(tmp_path, ROWS[:2], name="a.csv"))
    later = read_transactions(write(tmp_path, ROWS[2:], name="b.csv"))
    both, whole = joined(earlier, later, "b.csv"), read_transactions(write(tmp_path))
    assert both.digest() == whole.digest()
    with pytest.raises(UserError, match="begins at 2018-04-01T00:00:31, before its history ends"):
        joined(later, earlier, "a.csv")
    with pytest.raises(UserError, match="b.csv: row 1: TRANSACTION_ID is 'c', but its history has that name"):
        joined(whole, later, "b.csv")


def test_a_csv_may_count_seconds(tmp_path):
    rows = [
        row.replace("2018-04-01 00:00:31", "1522540831").replace("2018-04-02 23:59:59", "1522713599") for row in ROWS
    ]
    assert read_transactions(write(tmp_path, rows)).digest() == read_transactions(write(tmp_path)).digest()
    with pytest.raises(UserError, match=r"row 1: TX_DATETIME is 1522540831000\.0, .* \(are they milliseconds\?\)"):
        read_transactions(write(tmp_path, [row.replace("1522540831", "1522540831000") for row in rows]))
    with pytest.raises(UserError, match="TX_DATETIME holds days without a time of day"):
        read_transactions(write(tmp_path, [f"{i},20180401,1,1,5,0" for i in range(2)]))


def columns_of(folder, **changed):
    """The rows of `ROWS` as Parquet, with some columns changed."""
    cells = {
        name: list(column)
        for name, column in zip(HEAD.split(","), np.array([row.split(",") for row in ROWS]).T, strict=True)
    }
    cells["TX_AMOUNT"], cells["TX_FRAUD"] = [57.16, 81.51, 0.0], [0.0, 1.0, None]
    parquet.write_table(pa.table(cells | changed), folder / "payments.parquet")
    return str(folder / "payments.parquet")


@pytest.mark.parametrize(
    ("column", "cells", "message"),
    [
        (
            "TX_DATETIME",
            [1522540831.0, 1522540831.0, float("nan")],
            "row 3: TX_DATETIME is nan, but it must be a number of",
        ),
        ("TX_DATETIME", [1522540831000000] * 3, r"row 1: TX_DATETIME is 1522540831000000\.0.*are they microseconds"),
        ("CUSTOMER_ID", [596.0, float("nan"), 596.0], "row 2: CUSTOMER_ID is '', but it must not be empty"),
        ("TX_FRAUD_SCENARIO", [0, 257, 0], "row 2: TX_FRAUD_SCENARIO is 257, but it must be a whole number from 0"),
        ("TX_FRAUD_SCENARIO", [0, 1.5, 0], "row 2: TX_FRAUD_SCENARIO is 1.5, but it must be a whole number from 0"),
    ],
)
def test_a_wrong_number_of_a_parquet_file_is_named_with_its_row(tmp_path, column, cells, message):
    with pytest.raises(UserError, match=message):
        read_transactions(columns_of(tmp_path, **{column: cells}))


def test_whole_numbers_name_the_same_customer_in_any_type(tmp_path):
    for cells in ([596, 12345678901, 596], [596.0, 12345678901.0, 596.0]):
        assert read_transactions(columns_of(tmp_path, CUSTOMER_ID=cells)).customers.to_pylist() == [
            "596",
            "12345678901",
        ]


def test_no_file_is_left_open(tmp_path, monkeypatch):
    opened = []

    def opening(path):
        system, root = open_filesystem(path)
        real = system.open_input_stream

        class Watching:
            get_file_info = system.get_file_info

            def open_input_stream(self, place):
                opened.append(real(place))
                return opened[-1]

        return Watching(), root

    monkeypatch.setattr(transaction_files, "open_filesystem", opening)
    read_transactions(write(tmp_path))
    assert len(opened) == 2 and all(stream.closed for stream in opened)
