"""The embedded default text: sums, brackets and sentences in English and Chinese, drawn from a stated distribution.

The probability of every document is known, and with it the loss that no model can beat.
"""

import math

import numpy as np

OPERATIONS = ("+", "-", "*")
NUMBERS = 100
"""Operands are below it."""
BRACKETS = ("()", "[]", "{}")
DEEPEST = 6
OPEN = 0.5
"""Chance of a further bracket where both that and closing are possible."""
NAMES = ("Ada", "Emmy", "Karl", "Mary", "Otto", "Sofia", "Tom", "Yun")
THINGS = ("apples", "books", "coins", "keys", "maps", "pears", "pens", "stamps")
ADJECTIVES = ("big", "blue", "cold", "new", "old", "red", "small", "warm")
CREATURES = ("bird", "cat", "child", "dog", "farmer", "horse", "teacher", "wolf")
VERBS = ("finds", "follows", "greets", "helps", "hears", "loves", "sees", "watches")
WHO = ("小明", "小红", "老师", "医生", "爷爷", "奶奶", "司机", "护士")
WHEN = ("今天", "昨天", "早上", "晚上")
WHERE = ("公园", "学校", "医院", "图书馆", "商店", "车站", "河边", "家里")
DOES = ("看书", "喝茶", "唱歌", "画画", "散步", "休息", "做饭", "写信")


class Draw:
    """Uniform and biased choices, and how much information they held."""

    def __init__(self, rng: np.random.Generator) -> None:
        """Starts counting.

        Args:
          rng: Source of randomness.
        """
        self.rng, self.nats = rng, 0.0

    def below(self, count: int) -> int:
        """A whole number below `count`, all equally likely."""
        self.nats += math.log(count)
        return int(self.rng.integers(count))

    def of(self, options: tuple[str, ...]) -> str:
        """One of the options, all equally likely."""
        return options[self.below(len(options))]

    def happens(self, chance: float) -> bool:
        """True with the given chance."""
        drawn = bool(self.rng.random() < chance)
        self.nats -= math.log(chance if drawn else 1 - chance)
        return drawn


def _arithmetic(draw: Draw) -> str:
    a, b, sign = draw.below(NUMBERS), draw.below(NUMBERS), draw.of(OPERATIONS)
    return f"{a}{sign}{b}={ {'+': a + b, '-': a - b, '*': a * b}[sign] }"


def _brackets(draw: Draw) -> str:
    text, awaited = "", []
    while True:
        if awaited and (len(awaited) == DEEPEST or not draw.happens(OPEN)):
            text += awaited.pop()
            if not awaited:
                return text
        else:
            pair = draw.of(BRACKETS)
            text += pair[0]
            awaited.append(pair[1])


def _english(draw: Draw) -> str:
    if draw.happens(0.5):
        a, b, name, thing = 2 + draw.below(20), 2 + draw.below(20), draw.of(NAMES), draw.of(THINGS)
        return f"{name} has {a} {thing} and gets {b} more: {a + b} {thing}."
    return f"The {draw.of(ADJECTIVES)} {draw.of(CREATURES)} {draw.of(VERBS)} the {draw.of(CREATURES)}."


def _chinese(draw: Draw) -> str:
    return f"{draw.of(WHO)}{draw.of(WHEN)}在{draw.of(WHERE)}{draw.of(DOES)}。"


KINDS = (_arithmetic, _brackets, _english, _chinese)
LONGEST = 4
"""Lines of a document, all of one kind."""


def document(rng: np.random.Generator) -> tuple[str, float]:
    """Draws a document; different choices never give the same text.

    Args:
      rng: Source of randomness.

    Returns:
      The text, and minus the log of its probability in nats.
    """
    draw = Draw(rng)
    kind, lines = KINDS[draw.below(len(KINDS))], 1 + draw.below(LONGEST)
    return "\n".join(kind(draw) for _ in range(lines)), draw.nats
