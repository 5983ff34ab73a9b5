"""Which way quantities moved that a text compares: told by numbers, which words alone do not say."""

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar, NamedTuple

from r1jax.data.plugins import Case, Preprocessor

ARROWS = {1: "\u2191", -1: "\u2193", 0: "\u2194"}
FARTHEST = 160
"""Characters between two quantities that are compared, at most."""
_BEFORE = 40
_SCALES = dict.fromkeys(("k", "thousand"), 1_000) | dict.fromkeys(("m", "mn", "mln", "million"), 1_000_000)
_SCALES |= dict.fromkeys(("bn", "billion"), 10**9) | dict.fromkeys(("tn", "trillion"), 10**12)
_CURRENCIES = {"\u20ac": "eur", "euro": "eur", "euros": "eur", "$": "usd", "us$": "usd", "dollars": "usd"}
_CURRENCIES |= {"\u00a3": "gbp", "pounds": "gbp"}
_PERCENT = ("%", "percent", "per cent", "pct")
_CODE = "EUR|USD|GBP|JPY|CHF|SEK|DKK|NOK|RUB|PLN|CNY|INR|LTL|LVL|EEK"
_QUANTITY = re.compile(
    rf"(?<![\w.,-])(?P<before>US\$|[$\u20ac\u00a3]|(?:{_CODE}|euros?))?\s*"
    r"(?<![\d.,])(?P<number>[-+]?\d+(?: ?,\d{3})*(?:,\d{1,2}(?!\d))?(?: ?\.\d+)?)\s*"
    rf"(?P<scale>{'|'.join(sorted(_SCALES, key=len, reverse=True))}|{'|'.join(_PERCENT)})?(?!\w)"
    rf"(?:\s*(?P<after>{_CODE}|euros?|dollars|pounds)\b)?",
    re.IGNORECASE,
)
_LINK = re.compile(r"\b(?:from|compared|comparison|vs|versus|against|than)\b", re.IGNORECASE)
_FROM = re.compile(r"\bfrom\s*$", re.IGNORECASE)
_TO = re.compile(r"\bto\b", re.IGNORECASE)
_LOSS = re.compile(r"\b(?:loss|losses|deficit|negative)\b", re.IGNORECASE)
_LAST_LOSS = re.compile(_LOSS.pattern + r"[^.;,]*$", re.IGNORECASE)
_LAST_PROFIT = re.compile(r"\b(?:profit|profits|income|earnings|gain|positive)\b[^.;,]*$", re.IGNORECASE)


@dataclass
class Changes(Preprocessor):
    """Puts an arrow before a text for each way in which quantities moved that it compares: up, down or not at all.

    "Net loss was EUR 9.1 mn , compared to EUR 10.6 mn" begins with an arrow up then. Models that read digits as one
    letter, as `model.text_ngrams` does, cannot tell it from the words.

    Attributes:
      field: Name of the text.
    """

    field: str = "text"
    modality: ClassVar[str] = "text"

    def process(self, case: Case) -> Case:
        """Puts the arrows before the text of a case, each once, in the order of the text."""
        text = case[self.field]
        arrows = dict.fromkeys(ARROWS[way] for way in changes(text))
        return {**case, self.field: " ".join([*arrows, text])}


class _Quantity(NamedTuple):
    value: Decimal
    unit: str
    begin: int
    end: int


def changes(text: str) -> list[int]:
    """Ways of the quantities that a text compares.

    A quantity is a number with a currency, a scale or per cent beside it. Two of one unit are compared where a word
    such as "from", "compared" or "versus" stands between, and the former is the later one in time; of "from ... to ..."
    it is the latter. None is compared twice, nor one between two that are compared, such as the same in dollars. What
    follows "loss" is negative, and so is what a loss is compared with, unless that is a profit.

    Args:
      text: English.

    Returns:
      1, -1 or 0 for each pair, in the order of the text.
    """
    found, ways, first = _quantities(text), [], 0
    for place, later in enumerate(found):
        earlier = next((one for one in reversed(found[first:place]) if one.unit == later.unit), None)
        if earlier is None or later.begin - earlier.end > FARTHEST:
            continue
        before = text[max(0, earlier.begin - _BEFORE) : earlier.begin]
        between = text[earlier.end : later.begin]
        rising = _FROM.search(before) and _TO.search(between)
        if not rising and not _LINK.search(between):
            continue
        one, two = earlier.value, later.value
        lost = one > 0 and bool(_LOSS.search(before))
        if two > 0 and (_LAST_LOSS.search(between) or (lost and not _LAST_PROFIT.search(between))):
            two = -two
        one = -one if lost else one
        difference = two - one if rising else one - two
        ways.append((difference > 0) - (difference < 0))
        first = place + 1
    return ways


def _quantities(text: str) -> list[_Quantity]:
    found = []
    for match in _QUANTITY.finditer(text):
        currency, scale = (match["before"] or match["after"] or "").lower(), (match["scale"] or "").lower()
        if not currency and not scale:
            continue
        digits = re.sub(r",(\d{1,2})$", r".\1", match["number"].replace(" ", "")).replace(",", "")
        unit = "%" if scale in _PERCENT else _CURRENCIES.get(currency, currency)
        found.append(_Quantity(Decimal(digits) * _SCALES.get(scale, 1), unit, match.start(), match.end()))
    return found
