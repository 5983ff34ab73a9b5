"""Arrows say which way the quantities moved that a sentence compares."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.data.pipeline import open_pipeline
from r1jax.data.preprocess.changes import Changes, changes

UP, DOWN, SAME = "\u2191", "\u2193", "\u2194"
AMOUNTS = st.integers(1, 9_999_999)
"""In tenths."""
WRITTEN = (
    lambda tenths: f"EUR {Decimal(tenths) / 10} mn",
    lambda tenths: f"EUR{tenths // 10:,} .{tenths % 10} m",  # numbers that a tokenizer of words has broken
    lambda tenths: f"{tenths // 10:,}.{tenths % 10} million euros",
    lambda tenths: f"\u20ac{Decimal(tenths) / 10_000} bn",
    lambda tenths: f"EUR {tenths * 100_000:,}",
    lambda tenths: f"euro{tenths // 10},{tenths % 10} mln",
)
"""Ways to write tenths of a million euros."""
LATEST_FIRST = ("rose to {} from {} .", "was {} , compared to {} a year ago .", "of {} in 2009 , versus {} in 2008")
LATEST_FIRST += ("was {} ( USD 17 mn ) , up 3 % from {} ( USD 12 mn )",)


@given(AMOUNTS, AMOUNTS, st.sampled_from(WRITTEN), st.sampled_from(WRITTEN), st.sampled_from(LATEST_FIRST))
def test_the_larger_quantity_decides_however_it_is_written(one, two, write, other, form):
    way, later, earlier = (one > two) - (one < two), write(one), other(two)
    assert changes(f"Operating profit {form.format(later, earlier)}") == [way]
    assert changes(f"Operating loss {form.format(later, earlier)}") == [-way]
    assert changes(f"Operating profit went from {earlier} in May to {later}") == [way]
    assert changes(f"The loss changed from {earlier} to {later}") == [-way]
    assert changes(f"Operating profit was {later} , against a loss of {earlier}") == [1]
    assert changes(f"Operating loss was {later} , against a profit of {earlier}") == [-1]


@pytest.mark.parametrize(
    "text",
    [
        "Profit was EUR 3 mn , sales EUR 5 mn .",  # nothing compares them
        "Profit rose to EUR 3 mn from USD 5 mn .",
        "Sales rose to EUR 3 mn , up from 5 % .",
        "Staff fell to 3 from 5 in 2009 .",  # numbers without a unit may be years or pages
        "Profit was EUR 3 mn ; " + 40 * "later " + "from EUR 5 mn",
        "",
    ],
)
def test_other_quantities_are_not_compared(text):
    assert changes(text) == []


@pytest.mark.parametrize(
    ("text", "ways"),
    [
        ("Profit was EUR 0.1 mn , compared to EUR -0.4 mn .", [1]),
        ("Sales grew to EUR 5 mn from EUR 4 mn and profit fell to EUR 1 mn from EUR 2 mn .", [1, -1]),
        ("The margin was 9.7 % , compared with 9.7 per cent .", [0]),
        ("Sales grew by 8 % to EUR 5 mn , and costs to EUR 3 mn from EUR 4 mn .", [-1]),
    ],
)
def test_each_quantity_is_compared_once(text, ways):
    assert changes(text) == ways


def test_arrows_stand_before_the_text_each_once():
    before = "Sales fell to EUR 4 mn from EUR 5 mn , A to $ 1 from $ 2 , B to 3 % from 2 % and C to 3 k versus 3 k ."
    case = {"case_id": "1", "text": before, "label": 2}
    assert Changes().process(case) == {**case, "text": f"{DOWN} {UP} {SAME} {before}"}
    assert open_pipeline("changes").steps[0].run == Changes()


@given(st.text() | st.text(st.sampled_from("0123456789,. -+$%mnkEUReurofrom to\u0663\u212a")))
def test_any_text_is_kept(text):
    after = Changes().process({"text": text})["text"]
    assert after == " ".join([*dict.fromkeys({1: UP, -1: DOWN, 0: SAME}[way] for way in changes(text)), text])
    assert after.endswith(text)
