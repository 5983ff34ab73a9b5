import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.data.pipeline import open_pipeline
from r1jax.data.preprocess.text import clean
from r1jax.errors import UserError

CHINESE = "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u3000\uff08\u6d4b\u8bd5\uff09\u2026"
JOINED = "\u0646\u200c\u0648 \U0001f468\u200d\u2695"
"""Persian and an emoji with joiners, which carry meaning."""
HAN = st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF)
HAN |= st.sampled_from("\uff0c\u3002\uff1a\u300a\u300b\u3000x1")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("  a\t b  \r\n c\r\rd ", "a b\nc\n\nd"),
        ("e\u0301t\u00e9\x00\u200b", "\u00e9t\u00e9"),
        ("\n\n\n a \n\n\n\n b \n\n", "a\n\nb"),
        ("\ufeff" + CHINESE, CHINESE),
        (
            "\u0646\u200c\u0648 \U0001f468\u200d\u2695",
            "\u0646\u200c\u0648 \U0001f468\u200d\u2695",
        ),  # joiners carry meaning
        ("", ""),
    ],
)
def test_text_is_cleaned(before, after):
    assert clean(before) == after


def test_compatibility_form_loses_full_width_signs():
    assert clean("\uff21\uff0c\u3000b", "NFKC") == "A, b"


@given(st.text(), st.sampled_from(["NFC", "NFKC"]))
def test_cleaning_twice_changes_nothing(text, form):
    once = clean(text, form)
    assert clean(once, form) == once == unicodedata.normalize(form, once)
    assert not any(unicodedata.category(c) == "Cc" and c != "\n" for c in once) and "  " not in once


@given(st.text(HAN))
def test_chinese_is_left_alone(text):
    assert clean(text) == text


def test_other_forms_are_refused():
    with pytest.raises(UserError, match="form is 'NFD', but it must be 'NFC' or 'NFKC'"):
        open_pipeline("text_clean('NFD')")


def test_every_built_in_has_a_name():
    names = ["text_clean", "changes", "window", "resample(1.0)", "decode_image(8, 8)", "log_mel", "scale"]
    assert [step.text for step in open_pipeline("|".join(names)).steps] == names
