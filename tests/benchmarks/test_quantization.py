"""What benchmarks/quantization.py compares, leaves undone and prints."""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.quantization import FORMS, agreement, summary, wanted


def test_calls_agree_at_the_thresholds_of_the_first_model():
    task = SimpleNamespace(operating_points=lambda found, targets: {"a": {"threshold": 0.5}, "b": {"threshold": 0.1}})
    first = {"a": np.array([0.4, 0.6, 0.7, 0.5]), "b": np.array([0.0, 0.2, 0.3, 0.4])}
    second = {"a": np.array([0.6, 0.6, 0.7, 0.5]), "b": np.array([0.0, 0.2, 0.05, 0.4])}
    assert agreement(task, first, second, {}) == 0.75
    assert agreement(SimpleNamespace(operating_points=lambda found, targets: {}), first, second, {}) is None


def test_what_has_a_row_is_not_done_again():
    asked = SimpleNamespace(configs=["medical", "language"], seeds=[0, 1], forms=["float", "int8"])
    rows = [{"config": "medical", "seed": 0, "form": "int8"}, {"config": "medical", "seed": 1, "form": "float"}]
    assert list(wanted(asked, rows)) == [
        ("medical", 0, "float"),
        ("medical", 1, "int8"),
        *(("language", seed, form) for seed in (0, 1) for form in ("float", "int8")),
    ]
    assert FORMS[0] == "float"


def row(seed, change, low, calls=0.999):
    return {
        "config": "medical",
        "seed": seed,
        "form": "int8",
        "score": 0.9 + change,
        "change": change,
        "low": low,
        "high": -low,
        "agreement": calls,
        "smaller": 3.9 + seed / 100,
    }


def test_changes_are_told_in_points_with_the_interval_of_their_mean():
    rows = [{"config": "medical", "seed": 0, "form": "float", "score": 0.9}]
    rows += [row(0, -0.001, -0.002), row(1, 0.001, -0.0005, 0.998), row(2, 0.003, -0.004)]
    half = 4.302653 * 0.2 / 3**0.5  # Student's t of 2 degrees of freedom; the deviation is .2 points
    assert summary(rows).splitlines()[2:] == [
        f"| medical | int8 | 3 | +0.100 ({0.1 - half:+.3f} to {0.1 + half:+.3f}) | 0.400 | 99.87% | 3.90x |"
    ]
    assert half == pytest.approx(0.4968, abs=1e-4)
    alone = summary([row(0, -0.001, -0.002, None)]).splitlines()[2]
    assert alone == "| medical | int8 | 1 | -0.100 | 0.200 |  | 3.90x |"
