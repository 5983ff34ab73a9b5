"""What benchmarks/quantization.py compares, leaves undone and prints."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.common import Reordered
from benchmarks.quantization import FORMS, Measurement, agreement, summary, wanted
from benchmarks.quantization_child import Model, is_kept, keep, kept, moved
from r1jax.cli import load_config
from r1jax.fields import to_json
from r1jax.train.checkpoints import CheckpointFolder, check_same_run


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
        "cases": 12288,
        "moved": 0.0,
        "score": 0.9 + change,
        "change": change,
        "low": low,
        "high": -low,
        "agreement": calls,
        "smaller": 3.9 + seed / 100,
    }


def test_changes_are_told_in_points_with_the_interval_of_their_mean():
    rows = [{"config": "medical", "seed": 0, "form": "float", "score": 0.9, "moved": 0.0}]
    rows += [row(0, -0.001, -0.002), row(1, 0.001, -0.0005, 0.998), row(2, 0.003, -0.004)]
    half = 4.302653 * 0.2 / 3**0.5  # Student's t of 2 degrees of freedom; the deviation is .2 points
    assert summary(rows).splitlines()[2:] == [
        f"| medical | int8 | 3 | 12,288 | +0.100 ({0.1 - half:+.3f} to {0.1 + half:+.3f}) | 0.400 | 99.87% | 3.90x |"
    ]
    assert half == pytest.approx(0.4968, abs=1e-4)
    alone = summary([row(0, -0.001, -0.002, None)]).splitlines()[2]
    assert alone == "| medical | int8 | 1 | 12,288 | -0.100 | 0.200 |  | 3.90x |"
    wrong = summary([row(0, -0.001, -0.002) | {"moved": 0.24}]).splitlines()[-1]
    assert wrong == "WRONG: medical, seed 0, int8: outcomes move by 24.0% with the place of a case in its batch."


def test_outcomes_that_move_with_the_place_of_a_case_are_seen():
    rng, cases, few = np.random.default_rng(0), 12, 8
    values = {"a": rng.normal(size=cases), "b": rng.normal(size=(cases, 2))}
    source = SimpleNamespace(read_batch=lambda rows: {k: v[rows] for k, v in values.items()})
    earlier = Reordered(source, np.roll(np.arange(few), -1))
    shifted = earlier.read_batch(np.arange(len(earlier)))
    assert len(earlier) == few
    assert moved(values, shifted) == 0
    wrong = shifted | {"b": shifted["b"] + np.array([0, 1]) * (np.arange(few) % 2)[:, None]}  # at odd places
    assert moved(values, wrong) == pytest.approx(0.5 / values["b"][:, 1].std())


def test_outcomes_are_taken_only_where_they_were_made_by_the_same(tmp_path):
    file, found = tmp_path / "int8.npz", {"a": np.arange(4.0), "b": np.ones((4, 2))}
    assert not is_kept(file, "one")
    keep(file, found, {"a": np.array([0.0, 1, np.nan, 1])}, "one", 0.25)
    assert is_kept(file, "one") and not is_kept(file, "another")
    np.testing.assert_equal(kept(file), (found, {"a": np.array([0.0, 1, np.nan, 1])}, 0.25))


@pytest.fixture
def measurement(tmp_path):
    asked = SimpleNamespace(
        output=tmp_path / "q.json",
        work=tmp_path,
        configs=["language"],
        seeds=[0, 1],
        forms=["float", "int8", "int8, trained"],
        cases=8,
        sequences=8,
        overrides=[],
        tiny=True,
        minutes=1.0,
        jobs=2,
    )
    return lambda: Measurement(asked)


def startable(found):
    return {unit.name for unit in found.units if found.ready(unit)}


def test_the_first_seed_goes_ahead_and_what_is_made_of_a_run_of_floats_waits_for_it(measurement):
    found = measurement()
    first = {"language0-float"}
    assert startable(found) == first
    float_of = {unit.model.seed: unit for unit in found.units if unit.form == "float"}
    rows = float_of[0].model.run("float") / "metrics.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text("{}")  # its step is compiled
    assert startable(found) == {"language0-float", "language1-float"}
    for unit in float_of.values():
        unit.model.folder.mkdir(exist_ok=True)
        keep(unit.model.outcomes("float"), {}, {}, unit.model.made("float", unit.cases), 0.0)
    first |= {"language1-float", "language0-int8", "language1-int8", "language0-int8-trained"}
    assert startable(found) == first
    found.began -= 61  # the minute is over
    assert startable(found) == set()


def test_a_run_that_ends_with_rounding_goes_on_from_the_run_of_floats_at_half_of_it(tmp_path, monkeypatch):
    starts = []

    def train(words):
        config = load_config(words).config
        folder, t = CheckpointFolder(Path(config.workdir) / "checkpoints"), config.train
        for one in folder.all():
            check_same_run(one.config(), config, folder.path)
        starts.append((config.model.quant, [one.step for one in folder.all()]))
        for step in range(1, t.steps + 1):
            if step % t.save_every == 0 or step % t.eval_every == 0 or step == t.steps:
                folder.at(step).path.mkdir(parents=True, exist_ok=True)
                (folder.at(step).path / "config.json").write_text(to_json(config))
                for old in folder.all()[: -t.keep]:
                    shutil.rmtree(old.path)
        (Path(config.workdir) / "metrics.jsonl").write_text('{"examples_per_second": 1.0}\n')

    monkeypatch.setattr("train.main", train)
    monkeypatch.setattr("benchmarks.common.start_platform", lambda platform: None)
    model = Model(
        "language", 0, tmp_path, ("--train.steps", "5", "--train.warmup_steps", "1", "--train.eval_every", "1")
    )
    assert model.trained("float").step == model.trained("float").step == 5
    for form in ("int8, trained", "int4 weights, trained", "int8, running ranges, trained"):
        assert model.trained(form).step == 5
    assert starts == [((), []), (("int8",), [3]), (("int4",), [3]), (("int8_running",), [])]
    shutil.rmtree(model.run("float") / "checkpoints" / "00000003")  # as a run of an earlier form of the benchmark
    assert model.trained("float").step == 5 and starts[4:] == [((), [])]


def test_rows_are_written_at_once_and_a_run_of_floats_that_is_gone_is_made_again(measurement, tmp_path):
    found = measurement()
    found.note({"config": "language", "seed": 0, "form": "float", "score": 0.5, "cases": 8}, 1.0)
    found.note({"config": "language", "seed": 0, "form": "float", "score": 0.6, "cases": 8}, 2.0)
    again = measurement()
    assert [(row["form"], row["score"], row["seconds"]) for row in again.rows] == [("float", 0.6, 2.0)]
    assert again.units == found.units
