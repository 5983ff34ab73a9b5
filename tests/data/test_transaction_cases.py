"""Payments as cases: the schema holds, order does not matter, preprocessors and processes can read them."""

import pickle

import numpy as np
import pytest

from r1jax.data.pipeline import Preprocessed, open_pipeline
from r1jax.data.source import Source
from r1jax.data.transaction_cases import TransactionCases
from r1jax.data.transaction_history import History
from r1jax.data.transaction_simulator import simulate
from r1jax.data.transactions import DAY


@pytest.fixture(scope="module")
def cases():
    table = simulate(0, 30, 40)
    return TransactionCases("payments", table, History(table, 7 * DAY, 6), np.arange(100, 400))


def test_a_batch_is_what_the_schema_says(cases):
    assert isinstance(cases, Source) and cases.schema.modalities == {"series", "table", "text"}
    batch = cases.read_batch(np.array([7, 0, 299]))
    assert batch.keys() == set(cases.schema.names)
    for field in cases.schema.fields:
        if field.dtype:
            assert batch[field.name].dtype == field.dtype and batch[field.name].shape == (3, *field.shape)
        else:
            assert len(batch[field.name]) == 3
    assert batch["case_id"] == ["T0000107", "T0000100", "T0000399"]
    one = cases.read_batch(np.array([299]))
    for name, values in batch.items():
        np.testing.assert_array_equal(values[2], one[name][0])


def test_preprocessors_see_the_notes(cases):
    source = Preprocessed(cases, open_pipeline("text_clean"), 0)
    rows = np.arange(300)
    before, after = cases.read_batch(rows), source.read_batch(rows)
    assert len(set(after["text"])) > 5
    np.testing.assert_array_equal(after["series"], before["series"])


def test_a_reading_process_gets_the_same_cases(cases):
    copy = pickle.loads(pickle.dumps(cases))
    assert copy.fingerprint == cases.fingerprint
    np.testing.assert_array_equal(copy.read_batch(np.arange(5))["series"], cases.read_batch(np.arange(5))["series"])


def test_the_fingerprint_tells_other_cases_apart(cases):
    table, history = cases.table, cases.history
    others = [
        TransactionCases("payments", table, history, cases.rows[1:]),
        TransactionCases("payments", table, History(table, 8 * DAY, 6), cases.rows),
        TransactionCases("payments", simulate(1, 30, 40), history, cases.rows),
    ]
    assert len({cases.fingerprint, *(other.fingerprint for other in others)}) == 4
