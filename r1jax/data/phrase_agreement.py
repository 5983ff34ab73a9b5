"""How far annotators agreed on each sentence: what the other files of the Financial PhraseBank tell."""

import re
from dataclasses import replace

import numpy as np

from r1jax.data.phrase_files import read_phrases
from r1jax.data.record_files import is_file
from r1jax.data.records import UNKNOWN, Records

AGREED = {"50": 0.58, "66": 0.7, "75": 0.875, "All": 1.0}
"""Share of annotators that chose the label, by the strictest file that has the sentence: the middle between its bound
and the next."""
_NAME = re.compile(r"Sentences_(50|66|75|All)Agree\.txt$")


def read_agreed(path: str) -> Records:
    """Reads a file of sentences, and with it what the other Sentences_*Agree.txt of its folder say.

    Args:
      path: As `read_phrases` takes it.

    Returns:
      Its sentences in its order, then the labelled ones that only other files have, `beside`; `agreed` is the share of
      annotators behind each label. One sentence is spelled with other broken letters in another file, so that its ASCII
      letters and digits tell. Without other files, or under another name, what `read_phrases` returns.
    """
    own, named = read_phrases(path), _NAME.search(path)
    if named is None:
        return own
    folder = path[: named.start()]
    others = {level: f"{folder}Sentences_{level}Agree.txt" for level in AGREED if level != named[1]}
    found = {level: read_phrases(other) for level, other in others.items() if is_file(other)}
    if not found:
        return own
    found[named[1]] = own
    agreed: dict[str, float] = {}
    for level, share in AGREED.items():  # the strictest file that has a sentence tells
        if level in found:
            agreed |= {_letters(text): share for text in _texts(found[level])}
    seen = {_letters(text) for text in _texts(own)}
    ids, label, text = list(own.ids), own.label.tolist(), list(_texts(own))
    for level in sorted(others.keys() & found.keys()):
        other = found[level]
        for one, number, sentence in zip(other.ids, other.label.tolist(), _texts(other), strict=True):
            if number != UNKNOWN and _letters(sentence) not in seen:
                seen.add(_letters(sentence))
                ids.append(f"{level}:{one}")
                label.append(number)
                text.append(sentence)
    return replace(
        own,
        ids=ids,
        label=np.array(label, np.int32),
        text=text,
        agreed=np.array([agreed[_letters(one)] for one in text], np.float32),
        beside=np.arange(len(ids)) >= len(own.ids),
    )


def _letters(text: str) -> str:
    """What is equal for one sentence in whatever encoding: the text itself where ASCII is the lesser part of it."""
    found = re.sub("[^a-z0-9]+", "", text.lower())
    return found if 2 * len(found) >= len(text) else text


def _texts(records: Records) -> list[str]:
    assert records.text is not None
    return records.text
