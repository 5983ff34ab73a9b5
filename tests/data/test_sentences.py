import re

import numpy as np
import pytest

from r1jax.data import sentences
from r1jax.data.sentences import BRACKETS, DEEPEST, KINDS, Draw, document


def draw_many(count=2000, seed=0):
    rng = np.random.default_rng(seed)
    return [document(rng) for _ in range(count)]


def test_sums_are_right_and_brackets_match():
    sums = brackets = counts = 0
    for text, _ in draw_many():
        for line in text.splitlines():
            if match := re.fullmatch(r"(\d+)([-+*])(\d+)=(-?\d+)", line):
                a, b = int(match[1]), int(match[3])
                assert {"+": a + b, "-": a - b, "*": a * b}[match[2]] == int(match[4])
                sums += 1
            elif line[0] in "([{":
                left, deepest = line, 0
                while any(pair in left for pair in BRACKETS):
                    left = re.sub(r"\(\)|\[\]|\{\}", "", left)
                    deepest += 1
                assert left == "" and deepest <= DEEPEST
                brackets += 1
            elif match := re.fullmatch(r"\w+ has (\d+) (\w+) and gets (\d+) more: (\d+) (\w+)\.", line):
                assert int(match[1]) + int(match[3]) == int(match[4]) and match[2] == match[5]
                counts += 1
            else:
                assert re.fullmatch(r"The \w+ \w+ \w+ the \w+\.|[\u4e00-\u9fff]+。", line), line
    assert min(sums, brackets, counts) > 250


def test_same_text_has_the_same_probability():
    known = {}
    for text, nats in draw_many():
        assert known.setdefault(text, nats) == pytest.approx(nats)
    assert len(known) > 1000


def test_information_equals_the_log_of_the_frequency():
    """Of one-line documents that are not rare: as often drawn as their probability says."""
    drawn = draw_many(6000)
    seen = {}
    for text, nats in drawn:
        seen.setdefault(text, [nats, 0])[1] += 1
    common = [(np.exp(-nats), count) for nats, count in seen.values() if count >= 12]
    assert len(common) > 5
    expected, count = np.array(common).T
    assert abs(count.sum() - 6000 * expected.sum()) < 4 * np.sqrt(count.sum())


def test_information_of_the_uniform_kinds_is_the_log_of_their_number():
    for kind, number in ((sentences._arithmetic, 100 * 100 * 3), (sentences._chinese, 8 * 4 * 8 * 8)):
        draw = Draw(np.random.default_rng(1))
        kind(draw)
        assert kind in KINDS and draw.nats == pytest.approx(np.log(number))
