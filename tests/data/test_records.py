"""Records as cases, their parts, and the loaders of the three formats."""

import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r1jax.data.credit_files import read_credit
from r1jax.data.phrase_files import read_phrases
from r1jax.data.records import RecordCases, Records, held_out, in_periods, known
from r1jax.data.source import Source
from r1jax.data.stock_features import COUNTS, EVENTS, GAIN, LOSS, QUARTERS, STILL
from r1jax.data.stock_files import ENDS, HISTORY, read_stocks
from r1jax.errors import UserError
from tests.data.record_sets import credit_columns, write_credit, write_phrases, write_stocks


def test_records_are_a_source():
    records = Records(["a", "b", "c"], np.array([0, 1, -1], np.int32), np.eye(3, dtype=np.float32), text=["x", "", "z"])
    cases = RecordCases("three", records, np.array([2, 0]))
    assert isinstance(cases, Source) and len(cases) == 2 and cases.schema.modalities == {"table", "text"}
    batch = cases.read_batch(np.array([1, 0, 1]))
    assert batch["case_id"] == ["a", "c", "a"] and batch["text"] == ["x", "z", "x"]
    np.testing.assert_array_equal(batch["target.class"], [0, -1, 0])
    np.testing.assert_array_equal(batch["table"], np.eye(3)[[0, 2, 0]])
    other = Records(["a", "b", "c"], records.label, records.table, text=["x", "y", "z"])
    prints = {RecordCases("n", r, rows).fingerprint for r in (records, other) for rows in (cases.rows, np.arange(3))}
    assert len(prints) == 4


def test_a_sentence_is_the_same_whatever_letters_its_file_broke():
    said = ["Lemmink+ñinen 's profit rose", "Lemmink\ufffdinen 's profit rose", "利润 2010 上升", "利润 2010 下降"]
    records = Records(list("abcd"), np.zeros(4, np.int32), text=said)
    one, other, *rest = RecordCases("four", records, np.arange(4)).identities()
    assert one == other and len({one, *rest}) == 3


def test_folds_part_all_cases_and_keep_the_shares_of_the_classes():
    label = np.random.default_rng(0).choice(3, 103, p=[0.6, 0.3, 0.1]).astype(np.int32)
    folds = np.stack([held_out(label, 5, fold, 7) for fold in range(5)])
    assert (folds.sum(axis=0) == 1).all() and np.ptp(folds.sum(axis=1)) <= 1
    for k in range(3):
        assert np.ptp(folds[:, label == k].sum(axis=1)) <= 1
    assert (held_out(label, 5, 0, 8) != folds[0]).any()


def test_periods_follow_each_other():
    day = np.array([np.datetime64(d).astype(int) for d in ("2015-07-31", "2015-08-01", "2015-09-30", "2015-10-01")])
    found = {split: in_periods(day.astype(np.int32), split, ENDS).tolist() for split in ("train", "val", "test")}
    assert found == {"train": [1, 0, 0, 0], "val": [0, 1, 1, 0], "test": [0, 0, 0, 1]}


def test_nothing_can_be_learned_from_one_class():
    records = Records(["a", "b"], np.array([1, -1], np.int32))
    with pytest.raises(UserError, match="part has 1 cases with a known label, of fewer than two classes"):
        known(np.arange(2), records, "part")


def test_clients_are_read_under_both_names_of_their_columns(tmp_path):
    read = read_credit(str(write_credit(tmp_path / "x.parquet")))
    columns = credit_columns()
    np.testing.assert_array_equal(read.label, columns["Y"])
    np.testing.assert_array_equal(read.series[:, 0, :, 0], np.stack([columns[f"X{11 - m}"] for m in range(6)], axis=1))
    owed = np.clip(columns["X12"] / columns["X1"], -1, 2)
    np.testing.assert_allclose(read.series[:, 0, -1, 1], 3 * owed - 1.5, rtol=1e-5)
    np.testing.assert_allclose(read.table[:, 12], owed, rtol=1e-5)
    assert np.isfinite(read.table).all() and np.isfinite(read.series).all()
    names = {"X1": "LIMIT_BAL", "X2": "SEX", "X3": "EDUCATION", "X4": "MARRIAGE", "X5": "AGE", "X6": "PAY_0"}
    names |= {f"X{6 + m}": f"PAY_{m + 1}" for m in range(1, 6)} | {f"X{12 + m}": f"BILL_AMT{m + 1}" for m in range(6)}
    names |= {f"X{18 + m}": f"PAY_AMT{m + 1}" for m in range(6)} | {"Y": "default payment next month"}
    text = pa.table({names.get(name, name): column for name, column in columns.items()})
    pa.csv.write_csv(text, tmp_path / "x.csv")
    again = read_credit(str(tmp_path / "x.csv"))
    assert again.digest() == read.digest()


def test_sex_and_marital_status_are_no_inputs(tmp_path):
    other = write_credit(tmp_path / "x.parquet", X2=np.full(80, 7), X4=np.full(80, 9))
    assert read_credit(str(other)).digest() == read_credit(str(write_credit(tmp_path / "y.parquet"))).digest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"X14": None}, "has no column 'X14': it needs X1, X3 and X5 to X23"),
        ({"X1": np.where(np.arange(80) == 4, 0.0, 9.0)}, "row 5: X1 is 0.0, but it must be a number of at least 1"),
        ({"X20": np.where(np.arange(80) == 7, -1.0, 9.0)}, "row 8: X20 is -1.0, but it must be a number of at least 0"),
        ({"X13": np.where(np.arange(80) == 2, np.nan, 9.0)}, "row 3: X13 is nan, but it must be a finite number"),
        ({"X7": np.array(["late"] * 80)}, "column 'X7' is not numbers"),
        ({"Y": np.arange(80)}, "row 3: Y is 2, but it must be 0 or 1"),
        ({"ID": np.full(80, 3)}, "rows 1 and 2 both have the ID '3'"),
    ],
)
def test_wrong_clients_are_refused(tmp_path, changes, message):
    path = write_credit(tmp_path / "x.parquet", **changes)
    with pytest.raises(UserError, match=message):
        read_credit(str(path))


def test_a_file_that_is_not_there_and_one_of_another_kind_are_told_apart(tmp_path):
    with pytest.raises(UserError, match=r"absent\.parquet does not exist, or is no file"):
        read_credit(str(tmp_path / "absent.parquet"))
    (tmp_path / "x.txt").write_text("X1\n1\n")
    with pytest.raises(UserError, match=r"x\.txt is no \.csv or \.parquet file"):
        read_credit(str(tmp_path / "x.txt"))


def test_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "x.csv").write_text("X1,X3,X1\n1,2,3\n")
    with pytest.raises(UserError, match="has several columns 'X1': leave one of them"):
        read_credit(str(tmp_path / "x.csv"))


def test_clients_without_labels_can_be_scored(tmp_path):
    read = read_credit(str(write_credit(tmp_path / "x.parquet", Y=None, ID=None)))
    assert (read.label == -1).all() and read.ids[:2] == ["1", "2"]


def test_sentences_are_divided_at_the_last_at_and_kept_once(tmp_path):
    read = read_phrases(str(write_phrases(tmp_path / "x.txt")))
    assert len(read.ids) == 60 and all(text.endswith("mn @home") for text in read.text)
    rose = np.array(["rose" in text for text in read.text])
    np.testing.assert_array_equal(read.label == 2, rose)
    (tmp_path / "latin.txt").write_bytes("Umsätze stiegen@positive\nNobody knows@\n".encode("latin-1"))
    read = read_phrases(str(tmp_path / "latin.txt"))
    assert read.text == ["Umsätze stiegen", "Nobody knows"] and read.label.tolist() == [2, -1]


def test_a_sentence_that_comes_again_with_a_label_has_it(tmp_path):
    (tmp_path / "x.txt").write_text("Sales fell@\nSales rose@positive\nSales fell@negative\nSales rose@\n")
    read = read_phrases(str(tmp_path / "x.txt"))
    assert read.text == ["Sales fell", "Sales rose"] and read.label.tolist() == [0, 2] and read.ids == ["3", "2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fine@positive\nsales@up\n", "line 2 is 'sales@up', but it must end in @negative"),
        ("no label\n", "line 1 is 'no label'"),
        ("\n", "has no sentence"),
    ],
)
def test_wrong_sentences_are_refused(tmp_path, text, message):
    (tmp_path / "x.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_phrases(str(tmp_path / "x.txt"))
    with pytest.raises(UserError, match="does not exist, or is no file: name a file of sentences by --data.path"):
        read_phrases(str(tmp_path / "absent.txt"))


@pytest.fixture(scope="module")
def stocks(tmp_path_factory):
    return write_stocks(tmp_path_factory.mktemp("stocks") / "set")


def test_a_stock_has_a_case_a_day_behind_its_history(stocks):
    read, prices = read_stocks(str(stocks)), pq.read_table(stocks / "prices_raw.parquet").to_pandas()
    own = prices[prices.ticker == "AA"].reset_index(drop=True)
    returns = own["Adj Close"].pct_change().to_numpy()
    rows = np.flatnonzero(np.char.startswith(np.array(read.ids), "AA-"))
    assert len(rows) == len(own) - HISTORY - 1 and read.ids[rows[0]] == f"AA-{own.Date[HISTORY + 1]:%Y-%m-%d}"
    np.testing.assert_array_equal(read.label[rows], returns[HISTORY + 1 :] <= LOSS)
    np.testing.assert_array_equal(read.outcome[rows] == 2, returns[HISTORY + 1 :] >= GAIN)
    np.testing.assert_array_equal(read.outcome == 1, read.label == 1)
    for at in (0, 57):
        day = HISTORY + 1 + at
        past = np.clip(40 * returns[day - EVENTS : day], -4, 4)
        np.testing.assert_allclose(read.series[rows[at], 0, :, 0], past, rtol=1e-5, atol=1e-6)
    gap = np.flatnonzero(np.char.startswith(np.array(read.ids), "CC-"))
    assert len(gap) == len(rows) - HISTORY - 2  # neither the day that lacks, nor one that looks back at it


def test_the_numbers_of_a_day_are_those_of_the_windows_before_it(stocks):
    read, prices = read_stocks(str(stocks)), pq.read_table(stocks / "prices_raw.parquet").to_pandas()
    grid = prices.pivot(index="ticker", columns="Date")
    returns = grid["Adj Close"].pct_change(axis=1, fill_method=None)
    spread = (grid["High"] - grid["Low"]) / grid["Close"]
    volume = grid["Volume"].T.rolling(20, min_periods=1).mean().T.shift(1, axis=1)
    ratio = np.log((grid["Volume"] + 1) / (volume + 1))
    usual = np.sqrt((returns**2).T.rolling(60, min_periods=1).mean().T.shift(1, axis=1)) + STILL
    stir = np.minimum(returns.abs() / usual, 6) / 2 + np.minimum(np.exp(np.minimum(ratio, 2)), 5) - 1.5
    calendar = returns.columns.values.astype("datetime64[D]")
    told = np.array([name.split("-", 1) for name in read.ids])
    for row in (0, 300, 700, len(read.ids) - 1):
        at, own = int(np.searchsorted(calendar, np.datetime64(told[row, 1]))), told[row, 0]
        past, wide = returns.loc[own].to_numpy()[:at], spread.loc[own].to_numpy()[:at]
        roots = [wide[-1:], *(x[-days:] for x in (wide, past, np.minimum(past, 0)) for days in (5, 20, 60, 250))]
        expected = [2 * np.log(np.sqrt(np.nanmean(x**2)) + STILL) + 8 for x in roots]
        for days in (5, 20, 60, 250):
            seen = past[-days:][~np.isnan(past[-days:])]
            expected.append(np.log(np.mean(seen <= LOSS) + 0.005) + 4)
        news = stir.loc[own].to_numpy()
        spans = [(quarter - near, quarter + near) for quarter in QUARTERS for near in (1, 4)]
        for first, last in [*spans, (1, 1), (1, 10), (1, 40)]:
            seen = news[max(at - last, 0) : max(at - first + 1, 0)]
            seen = seen[~np.isnan(seen)]
            expected.append(seen.max() if len(seen) else 0)
        expected.append(ratio.loc[own].to_numpy()[at - 1])
        expected.append(2 * np.log(np.nanmean(spread.to_numpy()[:, at - 1]) + STILL) + 8)
        expected.append(200 * np.nanmean(returns.to_numpy()[:, at - 5 : at], axis=0).mean())
        np.testing.assert_allclose(read.table[row, :-COUNTS], np.clip(expected, -6, 6), rtol=1e-5, atol=1e-5)


def test_no_input_of_a_day_sees_that_day_or_a_later_one(stocks, tmp_path):
    day, rng = np.datetime64("2015-03-02"), np.random.default_rng(1)
    for name, column in (("prices_raw", "Date"), ("tweets", "created_at")):
        table = pq.read_table(stocks / f"{name}.parquet").to_pandas()
        later = table[column].dt.tz_localize(None) >= day
        for changed in ("High", "Low", "Close", "Adj Close", "Volume"):
            if changed in table:
                table.loc[later, changed] *= rng.uniform(0.5, 2, later.sum())
        if name == "tweets":
            table.loc[later, "text"] = "changed earnings"
            table = pd.concat([table, table[later]])
        pq.write_table(pa.Table.from_pandas(table, preserve_index=False), tmp_path / f"{name}.parquet")
    before, after = read_stocks(str(stocks)), read_stocks(str(tmp_path))
    seen = before.day <= day.astype(int)
    assert before.ids == after.ids and 400 < seen.sum() < len(seen)
    np.testing.assert_array_equal(before.table[seen], after.table[seen])
    np.testing.assert_array_equal(before.series[seen], after.series[seen])
    assert [t for t, s in zip(before.text, seen, strict=True) if s] == [
        t for t, s in zip(after.text, seen, strict=True) if s
    ]
    assert any(before.text[row] != after.text[row] for row in np.flatnonzero(~seen))
    moved = (before.table != after.table).any(axis=0)
    assert list(np.flatnonzero(~moved)) == [21, 22, 23, 24]  # the days behind are fewer than three quarters


def test_tweets_of_five_trading_days_are_read_the_newest_first(stocks):
    read, tweets = read_stocks(str(stocks)), pq.read_table(stocks / "tweets.parquet").to_pandas()
    calendar = np.unique(pq.read_table(stocks / "prices_raw.parquet")["Date"].to_numpy().astype("datetime64[D]"))
    for row in range(40, 300, 13):
        ticker, _, date = read.ids[row].partition("-")
        day = np.datetime64(date)
        first = calendar[np.searchsorted(calendar, day) - 5]
        written = tweets.created_at.dt.tz_localize(None)
        own = tweets[(tweets.ticker == ticker) & (written >= first) & (written < day)]
        assert read.text[row] == " / ".join(own.sort_values("created_at", ascending=False).text)


def test_a_tweet_of_midnight_is_of_the_day_that_begins(stocks, tmp_path):
    shutil.copy(stocks / "prices_raw.parquet", tmp_path)
    days = np.unique(pq.read_table(stocks / "prices_raw.parquet")["Date"].to_numpy().astype("datetime64[us]"))[100:103]
    written = [days[0] - np.timedelta64(1, "us"), days[1]]
    tweets = pa.table({"ticker": ["AA"] * 2, "created_at": written, "text": ["before", "midnight"]})
    pq.write_table(tweets, tmp_path / "tweets.parquet")
    read = read_stocks(str(tmp_path))
    rows = [read.ids.index(f"AA-{day.astype('datetime64[D]')}") for day in days]
    assert [read.text[row] for row in rows] == ["before", "before", "midnight / before"]
    np.testing.assert_allclose(read.table[rows, -COUNTS], np.log1p([1, 0, 1]) - 1, rtol=1e-6)


def test_tweets_are_counted_over_the_days_before(stocks, tmp_path):
    shutil.copy(stocks / "prices_raw.parquet", tmp_path)
    tweets = pq.read_table(stocks / "tweets.parquet")
    ends = ("EPS beat", "next steps, at headquarters", "#earnings", "their Quarterly figures")
    said = [f"{text} {ends[i % 4]}" for i, text in enumerate(tweets["text"].to_pylist())]
    tweets = changed(tweets, "text", pa.array(said))
    pq.write_table(tweets, tmp_path / "tweets.parquet")
    read, tweets = read_stocks(str(tmp_path)), tweets.to_pandas()
    calendar = np.unique(pq.read_table(stocks / "prices_raw.parquet")["Date"].to_numpy().astype("datetime64[D]"))
    written = tweets.created_at.dt.tz_localize(None)
    about = np.arange(len(tweets)) % 4 != 1  # neither steps nor headquarters are figures
    for row in range(40, 700, 33):
        ticker, _, date = read.ids[row].partition("-")
        at = int(np.searchsorted(calendar, np.datetime64(date)))
        own = (tweets.ticker == ticker) & (written < calendar[at])
        many = {days: own & (written >= calendar[at - days]) for days in (1, 5, 20)}
        late = (many[1] & (written.dt.hour >= 20)).sum()
        expected = [np.log1p(x.sum()) for x in many.values()]
        expected += [expected[0] - np.log1p(many[20].sum() / 20), np.log1p(late)]
        expected += [np.log1p((x & about).sum()) for x in many.values()]
        np.testing.assert_allclose(read.table[row, -COUNTS:], np.array(expected) - 1, rtol=1e-6, atol=1e-6)


def test_wrong_stocks_are_refused(stocks, tmp_path):
    with pytest.raises(UserError, match=r"has no file prices_raw\.parquet: name a folder of prices_raw\.parquet and"):
        read_stocks(str(tmp_path))
    shutil.copy(stocks / "tweets.parquet", tmp_path)
    prices = pq.read_table(stocks / "prices_raw.parquet")
    count = len(prices)
    for table, message in (
        (prices.drop_columns("Close"), "has no column 'Close'"),
        (pa.concat_tables([prices, prices.slice(3, 1)]), r"row 1260: AA has 2014-04-04 twice"),
        (prices.slice(0, 50), "has 50 trading days, but 62 are needed"),
        (changed(prices, "ticker", pa.array([None, *["AA"] * (count - 1)])), "row 1: ticker is empty"),
        (changed(prices, "Date", pa.array(np.arange(count) + 20140401)), "column 'Date' is numbers, but must be dates"),
    ):
        pq.write_table(table, tmp_path / "prices_raw.parquet")
        with pytest.raises(UserError, match=message):
            read_stocks(str(tmp_path))


def test_stocks_that_are_named_by_numbers_keep_their_tweets(stocks, tmp_path):
    for name in ("prices_raw", "tweets"):
        table = pq.read_table(stocks / f"{name}.parquet")
        numbers = pa.array([{"AA": 1, "BB": 2, "CC": 3}[x] for x in table["ticker"].to_pylist()])
        numbers = numbers if name == "tweets" else numbers.cast(pa.string())
        pq.write_table(changed(table, "ticker", numbers), tmp_path / f"{name}.parquet")
    assert read_stocks(str(tmp_path)).text == read_stocks(str(stocks)).text


def changed(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    """The table with another column in the place of one."""
    return table.set_column(table.column_names.index(name), name, column)
