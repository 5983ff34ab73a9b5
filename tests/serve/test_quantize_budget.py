"""Bits under a size: the choice against all choices, and the rules that say it."""

import itertools

import numpy as np
import pytest

from r1jax.errors import UserError
from r1jax.models.quantized import rule_of
from r1jax.serve.quantize_budget import Option, budget_table, choose, rules_of, smallest, within_budget
from r1jax.validation import quant_rules

RULES = ("float", "int8", "int4/128")


def weights(seed: int) -> dict[str, list[Option]]:
    """Six weights of which each may stay a float or take 8 or 4 bits; one is an embedding, which has no 4."""
    rng = np.random.default_rng(seed)
    found = {}
    for i in range(6):
        size = int(rng.integers(50, 5000))
        changes = (0.0, rng.exponential(1e-4), rng.exponential(1e-2))
        group = [Option(r, b * size // 2, c) for r, b, c in zip(RULES, (8, 2, 1), changes, strict=True)]
        found[f"layers_{i}/weight"] = group if i else group[:2]
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.14, 0.2, 0.3, 0.6])
def test_the_choice_is_the_best_of_all_that_fit(seed, share):
    found = weights(seed)
    limit = max(int(share * sum(group[0].bytes for group in found.values())), smallest(found))
    chosen = choose(found, limit)
    assert list(chosen) == list(found) and sum(option.bytes for option in chosen.values()) <= limit
    # Sizes are rounded up to units of the budget, so that what fits with some to spare must have been found.
    spare = 6 * (limit - smallest(found)) / 8192
    every = (c for c in itertools.product(*found.values()) if sum(o.bytes for o in c) <= limit - spare)
    best = min((sum(o.change for o in c) for c in every), default=np.inf)
    assert sum(option.change for option in chosen.values()) <= best + 1e-12


def test_each_weight_follows_the_rule_of_what_was_chosen_for_it():
    found = weights(0)
    chosen = {name: group[i % len(group)] for i, (name, group) in enumerate(found.items())}
    rules = quant_rules(rules_of(chosen))
    assert {option.rule for option in chosen.values()} == set(RULES)
    for name, option in chosen.items():
        rule = rule_of(name, rules)
        assert option.rule == (f"{rule.weights}/{rule.block}" if rule.block else rule.weights)
        assert rule_of(f"mtp/{name}", rules) is None
    lines = budget_table(found, chosen).splitlines()
    assert len(lines) == 7 and "int4/128" not in lines[1]  # the embedding


def test_a_budget_that_nothing_fits_is_refused_with_the_least_that_does():
    found = weights(0)
    numbers = sum(group[0].bytes for group in found.values()) // 4 + 1000
    with pytest.raises(UserError, match=r"--budget 0\.1 is too small: .* takes (0\.\d+) of its size") as caught:
        within_budget(found, numbers, 0.1)
    least = float(str(caught.value).split("takes ")[1].split()[0])
    assert within_budget(found, numbers, least)
    with pytest.raises(UserError):
        within_budget(found, numbers, least - 0.002)
