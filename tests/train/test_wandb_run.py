"""Figures at Weights & Biases, with a package of our own in its place."""

import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from r1jax.config import Config, TrainConfig
from r1jax.errors import UserError
from r1jax.train.run import open_run
from r1jax.train.wandb_run import WandbRun


class Refused(Exception):
    pass


@pytest.fixture
def started(monkeypatch):
    """Runs that were started there: what they were started with, and all that they were told."""
    runs = []

    def init(**given):
        run = SimpleNamespace(given=given, rows=[], metrics=[], finished=0)
        run.define_metric = lambda name, step_metric: run.metrics.append((name, step_metric))
        run.log = run.rows.append
        run.finish = lambda: setattr(run, "finished", run.finished + 1)
        runs.append(run)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=Refused))
    return runs


def with_project(tiny):
    return replace(tiny, config=replace(tiny.config, train=replace(tiny.config.train, wandb="nodules")))


def test_a_run_sends_the_rows_of_its_file_and_goes_on_with_the_same_id(tiny, stopped, tmp_path, started):
    workdir = shutil.copytree(stopped, tmp_path / "run")
    with_project(tiny).train(workdir)
    WandbRun(workdir, tiny.config, "nodules").close()
    (first, second), (known,) = started, {run.given["id"] for run in started}
    assert json.loads((workdir / "wandb.json").read_text()) == {"id": known} and len(known) == 8
    assert (first.given["project"], first.given["resume"], first.given["name"]) == ("nodules", "allow", "tiny")
    assert first.given["dir"] == str(workdir) and first.given["config"]["train"]["steps"] == 24
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    numbers = [{k: v for k, v in row.items() if not isinstance(v, list)} for row in rows if row["step"] > 15]
    assert first.rows == numbers and len(numbers) == 10 and first.metrics == [("*", "step")]
    assert (first.finished, second.finished) == (1, 1)


def test_without_the_package_the_run_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = Config(workdir=str(tmp_path / "run"), train=TrainConfig(wandb="nodules"))
    with (
        pytest.raises(UserError, match=r"train.wandb is 'nodules', but .* pip install 'r1jax\[wandb\]'"),
        open_run(config),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_what_the_package_refuses_is_one_sentence(tmp_path, monkeypatch):
    def init(**_):
        raise Refused("no API key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=Refused))
    with pytest.raises(UserError, match=r"wandb refuses \(no API key\).*WANDB_MODE=offline"):
        WandbRun(tmp_path, Config(), "nodules")
