"""The optimum that benchmarks/cache.py compares with is one, and the benchmark runs."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.cache import belady, table

ROOT = Path(__file__).resolve().parents[2]


def best_of_all(trace, room):
    """Tries every decision."""

    @cache
    def most(place, held):
        if place == len(trace):
            return 0
        value = trace[place]
        if value in held:
            return 1 + most(place + 1, held)
        choices = [held] if len(held) >= room else [held | {value}]
        choices += [held - {victim} | {value} for victim in held]
        return max(most(place + 1, frozenset(choice)) for choice in choices)

    return most(0, frozenset())


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(0, 4))
def test_belady_is_the_best_of_all_decisions(trace, room):
    assert belady(trace, room) == best_of_all(tuple(trace), room)


def test_the_benchmark_runs_and_no_demand_beats_the_optimum(tmp_path):
    words = ["--seeds", "1", "--scale", "0.03", "--output", str(tmp_path / "cache.json")]
    subprocess.run([sys.executable, "benchmarks/cache.py", *words], cwd=ROOT, check=True, capture_output=True)
    report = json.loads((tmp_path / "cache.json").read_text("utf-8"))
    for name, case in report["cases"].items():
        assert "ahead" in name or case["found"]["median"] <= case["belady"]["median"], name
    assert len(table(report).splitlines()) == 2 + len(report["cases"])


def test_what_the_documents_claim_was_measured():
    cases = json.loads((ROOT / "benchmarks/results/cache.json").read_text("utf-8"))["cases"]
    assert cases["training, windows of 8, 4 windows fit, 32 batches ahead"]["found"]["lowest"] >= 0.99
    zipf = cases["serving, Zipf 1.1, 40% fits"]
    assert zipf["found"]["lowest"] >= 0.92
    assert zipf["belady"]["highest"] - zipf["found"]["lowest"] <= 0.03
