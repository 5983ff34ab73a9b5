"""Ways to compile a model are held against fp32, case by case."""

import pytest

from benchmarks.precision_gap import compare, table


def test_cases_that_moved_far_are_counted():
    ways = {
        "fp32": {"score": 0.8, "said": {"a": [0.1, 0.9], "b": [0.5, 0.5]}, "beside_others": 0.0},
        "as it is": {"score": 0.7, "said": {"a": [0.1, 0.05], "b": [0.5, 0.52]}, "beside_others": 0.8},
        "verified": {"error": "exit code 1: first\nlast line"},
    }
    base, moved, refused = compare(ways)
    assert base == {"way": "fp32", "score": 0.8, "beside_others": 0, "mean": 0, "largest": 0, "far": 0}
    assert moved["mean"] == pytest.approx(0.87 / 4) and moved["largest"] == pytest.approx(0.85) and moved["far"] == 1
    assert refused == {"way": "verified", "refused": "exit code 1: first\nlast line"}
    assert "| as it is | 0.7000 | 2.2e-01 | 8.5e-01 | 1 | 8.0e-01 |" in table([base, moved, refused])
    assert "refused: last line" in table([refused])


def test_without_fp32_there_is_nothing_to_hold_against():
    (row,) = compare({"as it is": {"score": None, "said": {"a": [0.1]}, "beside_others": 0.0}})
    assert row == {"way": "as it is", "score": None, "beside_others": 0}
    assert "| as it is |  |  |  |  | 0.0e+00 |" in table([row])
