"""What benchmarks/quantization.py prints and compares."""

from types import SimpleNamespace

import numpy as np

from benchmarks.quantization import agreement, table


def test_calls_agree_at_the_thresholds_of_the_first_model():
    task = SimpleNamespace(operating_points=lambda found, targets: {"a": {"threshold": 0.5}, "b": {"threshold": 0.1}})
    first = {"a": np.array([0.4, 0.6, 0.7, 0.5]), "b": np.array([0.0, 0.2, 0.3, 0.4])}
    second = {"a": np.array([0.6, 0.6, 0.7, 0.5]), "b": np.array([0.0, 0.2, 0.05, 0.4])}
    assert agreement(task, first, second, {}) == 0.75


def test_changes_are_told_in_points_with_their_interval():
    rows = [
        {"seed": 0, "variant": "float", "score": 0.9},
        {
            "seed": 0,
            "variant": "PTQ int8",
            "score": 0.8991,
            "change": -0.0009,
            "low": -0.002,
            "high": 0.0001,
            "agreement": 0.9994,
            "smaller": 3.93,
        },
    ]
    lines = table(rows).splitlines()
    assert lines[2] == "| 0 | float | 0.9000 | | | |"
    assert lines[3] == "| 0 | PTQ int8 | 0.8991 | -0.090 (-0.200 to +0.010) | 99.94% | 3.93x |"
