from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.data.transaction_history import CHANNELS, FEATURES, History
from r1jax.data.transactions import DAY
from r1jax.serve.finance_alerts import worded
from r1jax.tasks.finance.batch import EVENT_FEATURES, scale_events
from r1jax.tasks.finance.reasons import (
    CATALOGUE,
    CODES,
    Contributions,
    by_concept,
    concept_of_event,
    concept_of_feature,
    top_reasons,
    weightiest_span,
)
from tests.data.streams import draw_table


def contributions(seed=0, n=3, events=4, text=6):
    rng = np.random.default_rng(seed)
    parts = (
        rng.normal(size=(n, len(FEATURES))),
        rng.normal(size=(n, 2, events, len(EVENT_FEATURES) + 1)),
        rng.normal(size=(n, text)),
    )
    change = sum(x.reshape(n, -1).sum(axis=1) for x in parts)
    return Contributions(*parts, np.full(n, -4.0), change - 4.0)


def test_events_have_as_many_numbers_as_names():
    assert scale_events(jnp.ones((1, 2, 3, len(CHANNELS)))).shape[-1] == len(EVENT_FEATURES)


def test_everything_that_is_read_belongs_to_a_reason():
    found = {concept_of_feature(name) for name in FEATURES} | {"note"}
    for stream in (0, 1):
        for present in (True, False):
            found |= {concept_of_event(stream, present, name) for name in (*EVENT_FEATURES, "state")}
    assert found == set(CODES)
    assert all(set(texts) == {"en", "zh"} and texts["en"] != texts["zh"] for texts in CATALOGUE.values())


def test_no_contribution_is_lost():
    found = contributions()
    np.testing.assert_allclose(found.residual, 0.0, atol=1e-12)
    sums = by_concept(found, FEATURES, EVENT_FEATURES)
    np.testing.assert_allclose(sums.sum(axis=1), found.output - found.baseline, atol=1e-12)


def test_contributions_go_where_they_belong():
    found = contributions()
    zero = Contributions(*(np.zeros_like(x) for x in found))
    state = EVENT_FEATURES.index("risk")
    zero.events[0, 1, 0, -1] = 2.0  # what is known of an earlier event at the terminal
    zero.events[0, 1, -1, state] = 1.0
    zero.table[1, FEATURES.index("customer_mean_7d")] = 3.0
    zero.text[2, 4] = 0.5
    sums = by_concept(zero, FEATURES, EVENT_FEATURES)
    assert top_reasons(sums[0]) == [("terminal-fraud", 3.0)]
    assert top_reasons(sums[1]) == [("customer-spending", 3.0)]
    assert top_reasons(sums[2]) == [("note", 0.5)]


def test_the_text_of_a_reason_does_not_hide_that_the_present_amount_is_in_it():
    """Apart from the reasons that name it, only what the customer spent changes with the amount of the payment."""
    table = draw_table()
    dearer = replace(table, amount=np.append(table.amount[:-1], np.float32(5000)))
    last, again = (History(stream, 7 * DAY, 4).features[-1] for stream in (table, dearer))
    codes = {concept_of_feature(name) for name, moved in zip(FEATURES, last != again, strict=True) if moved}
    assert codes == {"amount", "amount-unusual", "customer-spending"}
    texts = CATALOGUE["customer-spending"]
    assert "this payment included" in texts["en"] and "含本笔" in texts["zh"]


@given(st.integers(0, 2**16), st.floats(-1, 1))
def test_a_reader_can_check_that_a_report_adds_up(seed, missed):
    found = contributions(seed)
    found = found._replace(output=found.output + missed)
    for i, (reasons, told) in enumerate(worded(found, ["hello"] * 3)):
        gains = sum(gain for _, gain, _ in reasons)
        assert len(reasons) <= 4 and abs(told.residual - missed) < 1e-9
        assert abs(gains + told.rest + told.residual - (found.output[i] - found.baseline[i])) < 1e-9


def test_at_most_four_reasons_and_none_that_lower_the_score():
    sums = np.linspace(-1, 1, len(CODES))
    reasons = top_reasons(sums)
    assert [code for code, _ in reasons] == list(CODES[::-1][:4])
    assert top_reasons(-np.abs(sums)) == []
    assert len(top_reasons(np.array([1.0, 0.5, 0.01, *np.zeros(len(CODES) - 3)]))) == 2


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("customer could not confirm by phone", "not confirm", "not confirm"),
        ("customer could not confirm by phone", "ot confi", "not confirm"),
        ("已电话核实，本人否认", "否认", "本人否认"),
        ("持卡人PIN错误", "错", "错误"),
        ("pay", "", ""),
        ("", "", ""),
    ],
)
def test_the_span_is_what_the_contribution_rests_on(text, words, expected):
    gains = np.full(len(text.encode()) + 5, -0.01)  # padding lies behind the text
    if words:
        start = text.encode().index(words.encode())
        gains[start : start + len(words.encode())] = 1.0
    gains[len(text.encode()) :] = 9.0
    assert weightiest_span(text, gains) == expected
