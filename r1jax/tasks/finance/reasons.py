"""Why a transaction has its score: what each input adds, gathered into a few things that an investigator can check.

Every number that the model reads belongs to one concept. A reason is a concept with what it adds to the log-odds of
fraud, against a typical transaction of the same period.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from r1jax.tasks.envelope import Language
from r1jax.tasks.finance.batch import STATE_FEATURE

CATALOGUE: dict[str, dict[Language, str]] = {
    "amount": {"en": "Amount of the transaction", "zh": "本笔交易金额"},
    "amount-unusual": {
        "en": "Amount against what this customer usually pays",
        "zh": "本笔金额与该客户平常金额之比",
    },
    "time": {"en": "Hour and day of the week", "zh": "交易的时间与星期"},
    "customer-pace": {"en": "How often and when the customer paid lately", "zh": "该客户近期交易的频率与时间"},
    "customer-spending": {
        "en": "What the customer spent lately, this payment included",
        "zh": "该客户近期的消费金额（含本笔）",
    },
    "customer-fraud": {
        "en": "What is known of fraud among the customer's earlier transactions",
        "zh": "该客户以往交易中已知的欺诈情况",
    },
    "terminal-fraud": {"en": "What is known of fraud at this terminal", "zh": "该终端已知的欺诈情况"},
    "terminal-traffic": {"en": "How often and when this terminal was used lately", "zh": "该终端近期使用的频率与时间"},
    "terminal-amounts": {"en": "Earlier amounts at this terminal", "zh": "该终端以往的交易金额"},
    "note": {"en": "Wording of the note", "zh": "附言的措辞"},
}
"""Text of each reason code."""
CODES = tuple(CATALOGUE)
MOST = 4
"""Reasons given at most."""
LEAST = 0.02
"""Share of all that raises the score which a reason must add."""
TOLERANCE = 0.05
"""Share of the difference from the baseline that contributions may miss."""

_CJK = 0x2E80
"""The first code point of Chinese, Japanese and Korean letters."""
_PRESENT = {"amount": "amount", "ratio": "amount-unusual", "hour": "time", "weekday": "time", "risk": "terminal-fraud"}
"""Of the numbers of the transaction itself; the rest tells how long ago the last one was."""
_EARLIER = (
    {"amount": "customer-spending", "ratio": "customer-spending", "risk": "customer-fraud", "state": "customer-fraud"},
    {"amount": "terminal-amounts", "ratio": "terminal-amounts", "risk": "terminal-fraud", "state": "terminal-fraud"},
)
"""Of the numbers of earlier events, by stream; the rest tells when they were."""
_WHEN = ("customer-pace", "terminal-traffic")
_STATE = ("customer-fraud", "terminal-fraud")


def concept_of_event(stream: int, present: bool, channel: str) -> str:
    """The concept that a number of an event belongs to.

    Args:
      stream: 0 of the customer, 1 of the terminal.
      present: Whether the event is the transaction itself.
      channel: One of `EVENT_FEATURES`, or "state" for what is known of the label.

    Returns:
      A code of the catalogue.
    """
    if not present:
        return _EARLIER[stream].get(channel, _WHEN[stream])
    return _STATE[stream] if channel == "state" else _PRESENT.get(channel, _WHEN[stream])


def concept_of_feature(name: str) -> str:
    """The concept that a feature of the table belongs to: a code of the catalogue by the feature's name."""
    if name == "amount":
        return "amount"
    if name in ("weekend", "night"):
        return "time"
    whose, _, what = name.partition("_")
    kinds = {
        "customer": {
            "count": "customer-pace",
            "ratio": "amount-unusual",
            **dict.fromkeys(("mean", "usual", "large"), "customer-spending"),
            **dict.fromkeys(("genuine", "fraud"), "customer-fraud"),
        },
        "terminal": {
            **dict.fromkeys(("count", "unlabelled"), "terminal-traffic"),
            **dict.fromkeys(("risk", "genuine", "fraud"), "terminal-fraud"),
        },
    }
    return kinds[whose][what.split("_")[0]]


class Contributions(NamedTuple):
    """What each input of N transactions adds to the log-odds of fraud, from a baseline to the transaction."""

    table: Float[np.ndarray, "N F"]
    """By feature of the table."""
    events: Float[np.ndarray, "N S K C"]
    """By stream, event and number: `EVENT_FEATURES`, then the state of the label."""
    text: Float[np.ndarray, "N T"]
    """By token of the note; the first, which marks its beginning, holds what its n-grams say."""
    baseline: Float[np.ndarray, "N"]
    output: Float[np.ndarray, "N"]
    """Log-odds at both ends."""

    @property
    def residual(self) -> Float[np.ndarray, "N"]:
        """What all contributions together miss of the difference between both ends."""
        parts = (self.table, self.events, self.text)
        return self.output - self.baseline - sum(x.reshape(len(x), -1).sum(axis=1) for x in parts)

    @property
    def complete(self) -> Bool[np.ndarray, "N"]:
        """Whether the contributions add up, but for `TOLERANCE` of the difference."""
        return np.abs(self.residual) <= TOLERANCE * np.abs(self.output - self.baseline)


def by_concept(
    found: Contributions, features: tuple[str, ...], channels: tuple[str, ...]
) -> Float[np.ndarray, "N concepts"]:
    """Adds up the contributions of each concept.

    Args:
      found: Contributions.
      features: Names of the table's features.
      channels: Names of an event's numbers, without the state.

    Returns:
      One column a code, in the order of `CODES`.
    """
    n, streams, events, _ = found.events.shape
    sums = np.zeros((n, len(CODES)))
    for i, name in enumerate(features[: found.table.shape[1]]):
        sums[:, CODES.index(concept_of_feature(name))] += found.table[:, i]
    for stream in range(streams):
        for i, channel in enumerate((*channels, STATE_FEATURE)):
            here = found.events[:, stream, :, i]
            sums[:, CODES.index(concept_of_event(stream, True, channel))] += here[:, -1]
            sums[:, CODES.index(concept_of_event(stream, False, channel))] += here[:, :-1].sum(axis=1)
    sums[:, CODES.index("note")] += found.text.sum(axis=1)
    return sums


def top_reasons(sums: Float[np.ndarray, "concepts"]) -> list[tuple[str, float]]:
    """The codes that raise the score most, with what they add.

    Args:
      sums: Of each code, see `by_concept`.

    Returns:
      At most `MOST`, the largest first; none that adds less than `LEAST` of all that raises the score.
    """
    order = np.argsort(-sums, kind="stable")[:MOST]
    least = LEAST * sums[sums > 0].sum()
    return [(CODES[i], float(sums[i])) for i in order if sums[i] > 0 and sums[i] >= least]


def weightiest_span(text: str, contributions: Float[np.ndarray, "T"]) -> str:
    """The part of a note that its contribution rests on.

    That is the run of bytes with the largest sum of contributions, each less the mean size of all, widened to whole
    words; Chinese has no gaps between words, so it is widened to the whole clause.

    Args:
      text: The note.
      contributions: Of its tokens: the bytes of its UTF-8, from the first on.

    Returns:
      The words; empty where no part of the note raises the score.
    """
    data = text.encode()
    gains = contributions[: len(data)]
    if not len(gains) or gains.max() <= 0:
        return ""
    sums = np.concatenate([[0.0], np.cumsum(gains - np.abs(gains).mean())])
    lowest = np.minimum.accumulate(sums)
    end = int(np.argmax(sums[1:] - lowest[:-1])) + 1
    start = int(np.argmin(sums[:end]))
    first = len(data[:start].decode(errors="ignore"))
    last = len(text) - len(data[end:].decode(errors="ignore"))
    while first > 0 and _same_word(text[first - 1 : first + 1]):
        first -= 1
    while last < len(text) and _same_word(text[last - 1 : last + 1]):
        last += 1
    return text[first:last].strip()


def _same_word(pair: str) -> bool:
    """Whether two neighbours are letters of one word, or of one Chinese clause."""
    return len(pair) == 2 and pair.isalnum() and len({ord(letter) < _CJK for letter in pair}) == 1
