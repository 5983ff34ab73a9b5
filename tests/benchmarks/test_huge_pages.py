"""benchmarks/huge_pages.py: its table, and that it trains both ways to the same losses."""

import json

import pytest

from benchmarks.huge_pages import WAYS, main, table
from r1jax.errors import UserError
from r1jax.huge_pages import with_huge_pages


def test_table_shows_medians_and_spread():
    run = {"seconds": 9, "user_seconds": 8, "system_seconds": 2, "faults": 1000, "losses": []}
    runs = [run | {"examples_per_second": rate} for rate in (50, 90, 60)]
    assert table({"results": {"small pages": runs}}).endswith("| small pages | 60 (50 to 90) | 8 + 2 | 1,000 | 9 |")


def test_refused_where_there_is_nothing_to_compare(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.huge_pages.with_huge_pages", lambda tunables: None)
    with pytest.raises(UserError, match="nothing to compare"):
        main(["--output", str(tmp_path / "x.json")])


@pytest.mark.slow
@pytest.mark.skipif(with_huge_pages("") is None, reason="this machine gives no huge pages, or gives them unasked")
def test_both_ways_train_alike(tmp_path):
    main(["--output", str(tmp_path / "x.json"), "--rounds", "1", "--steps", "20", "--variant", ":smoke"])
    runs = json.loads((tmp_path / "x.json").read_text())["results"]
    assert list(runs) == list(WAYS) and all(len(each) == 1 for each in runs.values())
    small, huge = (each[0] for each in runs.values())
    assert small["losses"] == huge["losses"] and len(huge["losses"]) == 4
    assert 0 < huge["faults"] < small["faults"] and huge["examples_per_second"] > 0
