"""Settings of the default run are compared over seeds, on cases that are drawn once."""

import argparse
import json
import sys

import numpy as np
import pytest

from benchmarks import children, common, medical_settings
from benchmarks.drawn import DONE, place_of
from r1jax.cli import load_config
from r1jax.config import Config
from r1jax.serve import evaluate
from r1jax.tasks.catalog import TASKS
from r1jax.tasks.medical import task as medical
from r1jax.train import evaluation

SMALL = ["--model.volume.size", "16", "16", "16", "--data.train_cases", "32"]


def arguments(tmp_path, **changes):
    given = {"workdir": str(tmp_path), "cases": 48, "seeds": [0], "variants": ["", "train.muon"], "overrides": SMALL}
    return argparse.Namespace(**given | changes)


def test_a_variant_is_what_its_overrides_make_of_the_default_run():
    default = load_config(["--config", "configs/medical.py", "--seed", "3"]).config
    assert load_config(medical_settings.command("", 3, [])).config == default
    other = load_config(medical_settings.command("train.muon train.steps=7", 3, ["--train.warmup_steps", "2"])).config
    assert (other.train.muon, other.train.steps, other.train.warmup_steps) == ((), 7, 2)
    assert default.train.muon and other.model == default.model


def test_a_variant_is_trained_through_train_py_on_drawn_cases_and_judged_in_every_mode(tmp_path, monkeypatch):
    monkeypatch.setattr(medical, "SyntheticCases", medical.SyntheticCases)  # put back what the child replaces
    args, trained = arguments(tmp_path), []
    medical_settings.draw_cases(args)
    config = load_config(medical_settings.command("", 0, SMALL)).config
    source = medical_settings.judged(config, 48)
    for cases in (source, TASKS["medical"](config).source("train")):
        assert (place_of(cases, tmp_path / "cases") / DONE).exists()

    class Checkpoint:
        def config(self) -> Config:
            return config

    class Judge:
        def __init__(self, *_):
            pass

        def predict(self, params, source, *, batch_size, modes):
            assert (params, len(source)) == ("its weights", 48)
            batch = source.read_batch(np.arange(48))
            targets = {name: batch[f"target.{name}"] for name in ("nodule_present", "malignancy")}
            right = {name: np.nan_to_num(value, nan=0.5) for name, value in targets.items()}
            wrong = {name: 1 - value for name, value in right.items()}
            return {"both": right, "image_only": right, "record_only": wrong}, targets, None

    def train_run(words, folder):
        trained.append((words, folder))
        return common.Trained(Checkpoint(), 5.0, 1.0)

    monkeypatch.setattr(common, "train_run", train_run)
    monkeypatch.setattr(evaluate, "restore_served", lambda *_: "its weights")
    monkeypatch.setattr(evaluation, "Evaluator", Judge)
    told = medical_settings.train_variant("train.muon", 0, args)
    figures = told["run"]["figures"]
    assert (figures["presence"], figures["malignancy"], figures["record only"]) == (1.0, 1.0, 0.0)
    assert figures["way"] > 1  # the drawn outcomes cannot be known, so that right ones are beyond what is attainable
    assert (told["run"]["seconds"], told["run"]["cases"]) == (5.0, 32)
    ((words, folder),) = trained
    assert words[4:] == ["--train.muon", *SMALL] and folder == tmp_path / "train-muon-0"


def test_all_are_held_against_the_first_seed_by_seed(tmp_path, monkeypatch, capsys):
    output, drawn = tmp_path / "out.json", []
    words = ["medical_settings.py", "--output", str(output), "--variants", "", "a=1", "b=2", "--seeds", "0", "1"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(medical_settings, "draw_cases", drawn.append)

    def run_at_once(commands, **_):
        assert [words[1:4] for words in commands.values()] == [
            ["--child", name, seed] for seed in "01" for name in ("", "a=1", "b=2")
        ]
        for key, (_, _, name, seed, *_) in reversed(commands.items()):
            if name == "b=2" and seed == "1":
                yield key, {"error": "out of memory"}
                continue
            value = 0.9 + 0.02 * int(seed) + {"": 0.0, "a=1": 0.01, "b=2": 0.0}[name] * (1 + int(seed))
            figures = dict.fromkeys(medical_settings.FIGURES, 0.5) | {"malignancy": value}
            run = {"variant": name, "seed": int(seed), "steps": 1200, "cases": 9, "seconds": 1.0, "figures": figures}
            yield key, {"run": run, "environment": {"versions": {}}}

    monkeypatch.setattr(children, "run_at_once", run_at_once)
    with pytest.raises(SystemExit, match="without b=2, seed 1"):
        medical_settings.main()
    runs = json.loads(output.read_text())["runs"]
    assert [(run["variant"], run["seed"]) for run in runs] == [("", 0), ("", 1), ("a=1", 0), ("a=1", 1), ("b=2", 0)]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in medical_settings.table({"runs": runs}).split("\n")
    ]
    assert rows[2][:5] == ["as it is", "1,200", "2", "0.5000 ± 0.0000", "0.9100 ± 0.0141"]
    assert rows[3][0] == "`a=1`" and rows[3][-1] == "+0.0150 ± 0.0050"  # gains of .01 and .02
    assert rows[4][2:5:2] == ["1", "0.9000"] and rows[4][-1] == "" and rows[2][-1] == ""
    assert len(drawn) == 1 and "out of memory" in capsys.readouterr().out
