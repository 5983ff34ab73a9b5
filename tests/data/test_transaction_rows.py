"""Rows of payments as they come in, and what is said of those that are wrong."""

import pytest

from r1jax.data.transaction_live import Payment
from r1jax.data.transaction_rows import Row, parse, records
from r1jax.data.transactions import Names
from r1jax.errors import UserError

NAMES = Names(amount="EUR")
GOOD = {"TRANSACTION_ID": 7, "TX_DATETIME": "2018-04-01 13:30:00", "CUSTOMER_ID": "c", "TERMINAL_ID": 1.0, "EUR": 9}
WANTED = Payment("7", 1_522_589_400, "c", "1", 9.0)


def read(text):
    return list(records(text.splitlines(keepends=True)))


def test_json_and_csv_say_the_same():
    found = read('{"TRANSACTION_ID": "7", "EUR": 1.5}\n\n[1]\n{"a":\n')
    assert found[0] == {"TRANSACTION_ID": "7", "EUR": 1.5}
    assert "no JSON object" in str(found[1]) and "no JSON (" in str(found[2])
    found = read('TRANSACTION_ID,EUR,TX_TEXT\n7,1.5,"a\n\nb"\n\n8,2\n')
    assert found[0] == {"TRANSACTION_ID": "7", "EUR": "1.5", "TX_TEXT": "a\n\nb"}
    assert "it has 2 cells, but the header has 3" in str(found[1]) and len(found) == 2
    assert read("") == [] == read("a,b\n") and read("\ufeffa\n1\n") == [{"a": "1"}]
    with pytest.raises(UserError, match="'a' twice"):
        read("a,b,a\n1,2,3\n")


def test_what_is_no_csv_is_told_and_the_next_row_is_read():
    found = list(records(["a,b\n", "1,2\r3\n", f"4,{'x' * 200_000}\n", "5,6\n"]))
    assert ["this is no CSV" in str(row) for row in found[:2]] == [True, True] and found[2:] == [{"a": "5", "b": "6"}]
    with pytest.raises(UserError, match="the header is no CSV"):
        list(records(["a,b\r1,2\r"]))


@pytest.mark.parametrize(
    "time", ["2018-04-01T13:30:00.9Z", "2018-04-01T15:30:00+02:00", 1522589400, 1522589400.7, "1522589400"]
)
def test_times_are_those_of_files(time):
    assert parse(GOOD | {"TX_DATETIME": time}, NAMES).payment == WANTED


def test_a_payment_may_have_a_note_and_an_outcome_and_an_outcome_may_come_alone():
    assert parse(GOOD, NAMES) == Row("7", WANTED, "", None)
    assert parse(GOOD | {"TX_FRAUD": 1.0}, NAMES).fraud and parse(GOOD | {"TX_FRAUD": ""}, NAMES).fraud is None
    assert parse(GOOD | {"TX_TEXT": "hi", "TX_FRAUD": "0"}, NAMES) == Row("7", WANTED, "hi", False)
    assert parse({"TRANSACTION_ID": "x", "TX_FRAUD": 1, "EUR": ""}, NAMES) == Row("x", None, "", True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"EURO": 1}, r"the column 'EURO' is unknown \(did you mean 'EUR'\?\)"),
        ({"EUR": None}, "EUR is missing: a payment has TRANSACTION_ID, TX_DATETIME, CUSTOMER_ID, TERMINAL_ID, EUR"),
        ({"EUR": "1,5"}, "EUR is '1,5', but it must be a number"),
        ({"EUR": True}, "EUR is True, but it must be a number"),
        ({"CUSTOMER_ID": 1.5}, "CUSTOMER_ID is 1.5, but it must be a text or a whole number"),
        ({"CUSTOMER_ID": "\udc80"}, "which is not UTF-8"),
        ({"TX_FRAUD": 2}, "TX_FRAUD is 2, but it must be 1"),
        ({"TX_FRAUD": []}, "TX_FRAUD is .., but it must be 1"),
        ({"TX_DATETIME": "2018-04-01"}, "must be a time such as"),
        ({"TX_DATETIME": "20180401"}, "TX_DATETIME is '20180401', a day without a time of day"),
        ({"TX_DATETIME": "soon"}, "TX_DATETIME is 'soon', but it must be a time such as"),
        ({"TX_DATETIME": float("nan")}, "TX_DATETIME is nan, but it must be a number of seconds"),
    ],
)
def test_a_wrong_row_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        parse(GOOD | change, NAMES)
