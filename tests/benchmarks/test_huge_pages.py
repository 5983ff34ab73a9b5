"""benchmarks/huge_pages.py: its table, the order of its runs, and that both ways have to train alike."""

import json

import pytest

from benchmarks import huge_pages
from benchmarks.huge_pages import WAYS, main, table
from r1jax.errors import UserError

RUN = {"seconds": 9, "user_seconds": 8, "system_seconds": 2, "faults": 1000, "losses": [3.0, 2.0]}


@pytest.fixture
def measured(monkeypatch):
    """The tunable of each run, none of which trains; losses are those of `change` where it is given."""

    def runs(change=lambda tunable: {}):
        seen = []

        def measure(tunable, steps):
            seen.append((tunable, steps))
            return RUN | {"examples_per_second": 50 + 10 * len(seen)} | change(tunable)

        monkeypatch.setattr(huge_pages, "with_huge_pages", lambda tunables: "given")
        monkeypatch.setattr(huge_pages, "measure", measure)
        return seen

    return runs


def test_table_shows_medians_and_spread():
    runs = [RUN | {"examples_per_second": rate} for rate in (50, 90, 60)]
    assert table({"results": {"small pages": runs}}).endswith("| small pages | 60 (50 to 90) | 8 + 2 | 1,000 | 9 |")


def test_ways_take_turns_behind_a_run_that_does_not_count(measured, tmp_path):
    seen = measured()
    main(["--output", str(tmp_path / "x.json"), "--rounds", "2", "--steps", "20"])
    assert seen == [(tunable, 20) for tunable in (1, 0, 1, 0, 1)]
    results = json.loads((tmp_path / "x.json").read_text())["results"]
    assert {name: [run["examples_per_second"] for run in runs] for name, runs in results.items()} == dict(
        zip(WAYS, ([70, 90], [80, 100]), strict=True)
    )


def test_other_losses_are_an_error(measured, tmp_path):
    measured(lambda tunable: {"losses": [3.0, 2.0 + tunable]})
    with pytest.raises(UserError, match="do not train alike"):
        main(["--output", str(tmp_path / "x.json"), "--rounds", "1"])


def test_refused_where_there_is_nothing_to_compare(monkeypatch, tmp_path):
    monkeypatch.setattr(huge_pages, "with_huge_pages", lambda tunables: None)
    with pytest.raises(UserError, match="nothing to compare"):
        main(["--output", str(tmp_path / "x.json")])
