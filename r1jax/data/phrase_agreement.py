"""How far annotators agreed on each sentence: what the other files of the Financial PhraseBank tell."""

import re
from dataclasses import replace

import numpy as np

from r1jax.data.filesystem import divide_options
from r1jax.data.phrase_files import read_phrases
from r1jax.data.record_files import is_file
from r1jax.data.records import UNKNOWN, Records, letters

AGREED = {"50": 0.58, "66": 0.7, "75": 0.875, "All": 1.0}
"""Share of annotators that chose the label, by the strictest file that has the sentence with it: the middle between
its bound and the next."""
_NAME = re.compile(r"Sentences_(50|66|75|All)Agree\.txt$")


def read_agreed(path: str) -> Records:
    """Reads a file of sentences, and with it what the other Sentences_*Agree.txt of its folder say.

    Args:
      path: As `read_phrases` takes it.

    Returns:
      Its sentences in its order, then the labelled ones that only other files have, `beside`; `agreed` is the share of
      annotators behind each label. One sentence is spelled with other broken letters in another file, so that `letters`
      tells. Without other files, or under another name, what `read_phrases` returns.
    """
    place, options = divide_options(path)
    own, named = read_phrases(path), _NAME.search(place)
    if named is None:
        return own
    folder = place[: named.start()]
    others = {level: f"{folder}Sentences_{level}Agree.txt{options}" for level in AGREED if level != named[1]}
    found = {level: read_phrases(other) for level, other in others.items() if is_file(other)}
    if not found:
        return own
    found[named[1]] = own
    agreed: dict[tuple[str, int], float] = {}
    for level, share in AGREED.items():  # the strictest file that has a sentence with that label tells
        if level in found:
            agreed |= dict.fromkeys(_labelled(found[level]), share)
    seen = {letters(text) for text in _texts(own)}
    ids, label, text = list(own.ids), own.label.tolist(), list(_texts(own))
    for level in sorted(others.keys() & found.keys()):
        other = found[level]
        for one, number, sentence in zip(other.ids, other.label.tolist(), _texts(other), strict=True):
            if number != UNKNOWN and letters(sentence) not in seen:
                seen.add(letters(sentence))
                ids.append(f"{level}:{one}")
                label.append(number)
                text.append(sentence)
    told = replace(own, ids=ids, label=np.array(label, np.int32), text=text)
    return replace(
        told,
        agreed=np.array([agreed[one] for one in _labelled(told)], np.float32),
        beside=np.arange(len(ids)) >= len(own.ids),
    )


def _labelled(records: Records) -> list[tuple[str, int]]:
    """Each sentence in whatever spelling, with its label."""
    return [(letters(text), label) for text, label in zip(_texts(records), records.label.tolist(), strict=True)]


def _texts(records: Records) -> list[str]:
    assert records.text is not None
    return records.text
