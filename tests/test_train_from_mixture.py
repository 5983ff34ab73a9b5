"""Training from a mixture of folders, by the commands of a user."""

import json
import signal

import numpy as np
import pytest

import eval as evaluate
from r1jax.serve.data_command import convert
from tests.data.folders import write
from tests.test_train import ROOT, TINY, command, last_state
from tests.train.experiment import CLOCK, one_device
from tests.train.forked import signal_at

MIXED = ("--data.weights", 3, 1, "--train.steps", 8, "--train.eval_every", 4, "--train.save_every", 2)


def folder(place, seed, **more):
    """Cases with volumes and records, two thirds of them for training."""
    draw, n = np.random.default_rng(seed), 12
    return write(
        place,
        volume=draw.integers(-1000, 400, (n, 16, 16, 16)).astype(np.int16),
        age=draw.integers(40, 80, n),
        nodule_present=np.arange(n) // 3 % 2,
        malignancy=np.arange(n) % 2,
        split=np.where(np.arange(n) % 3, "train", "val"),
        **more,
    )


def figures(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK and not k.startswith("cache.")} for row in found]


@pytest.fixture
def go(trainings, tmp_path):
    """Starts train.py on a folder and further flags."""

    def run(name, path, *more, before=""):
        words = ("--config", TINY, "--workdir", tmp_path / name, "--data.path", path, *MIXED, *more)
        return trainings.start(tmp_path / "out", tmp_path / "err", *words, before=before)

    return run


@pytest.mark.slow
def test_a_mixture_is_trained_on_resumed_exactly_and_known_again(go, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(evaluate, "make_mesh", lambda _: one_device())
    here = folder(tmp_path / "here", 0)
    there = folder(tmp_path / "there", 1, has_volume=np.arange(12) % 4 > 0)  # one folder alone has cases with gaps
    stored = str(tmp_path / "stored")
    assert convert([str(there), stored, "--group-rows", "2"]) == 0

    def run(name, *more):
        assert go(name, here, *more).wait(200) == 0, (tmp_path / "err").read_text("utf-8")

    def score(path, split):
        words = ["--checkpoint", tmp_path / "whole", "--data.path", path, "--data.split", split, "--pictures", 0]
        words += ["--output", tmp_path / "scores", "--resamples", 2]
        assert not evaluate.main(list(map(str, words)))
        return json.loads((tmp_path / "scores/metrics.json").read_text())

    run("whole", "--data.mix", there)
    published = signal_at("r1jax.train.goodput:Clock.mark", signal.SIGKILL, call=1, delay=0.0)
    code = go("cut", here, "--data.mix", there, before=published).wait(200)
    assert code == -signal.SIGKILL, (tmp_path / "err").read_text("utf-8")
    run("cut", "--data.mix", there, "--data.workers", 2, "--data.threads", 1)
    assert "goes on from" in (tmp_path / "err").read_text("utf-8")
    (_, whole), (step, cut) = last_state(tmp_path / "whole"), last_state(tmp_path / "cut")
    assert step == 8 and len(whole) > 100 and all(x.tobytes() == cut[name].tobytes() for name, x in whole.items())
    assert figures(tmp_path / "whole") == figures(tmp_path / "cut")

    run("stored", "--data.mix", stored)  # a folder and Parquet files mix
    assert figures(tmp_path / "stored") == figures(tmp_path / "whole")
    other = folder(tmp_path / "other", 2)
    words = ("--config", TINY, "--data.path", here, "--workdir", tmp_path / "whole", *MIXED, "--data.mix", other)
    code, _, err = command(monkeypatch, capsys, *words)
    assert code == 2 and "other content" in err[-1]

    for path in (here, there):
        assert score(path, "all")["provenance"]["data"]["seen_in_training"] == 8
    told = [score(path, "val")["warnings"] for path in (here, there)]
    assert ["chose the checkpoint" in " ".join(lines) for lines in told] == [True, False]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data.mix", "b"), "data.weights"),
        (("--data.weights", 1, 2), "data.weights"),
        (("--data.mix", "a", "--data.weights", 1, 2), "other folders than data.path"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(monkeypatch, capsys, flags, words):
    monkeypatch.chdir(ROOT)
    code, _, err = command(monkeypatch, capsys, "--config", TINY, "--data.path", "a", *flags)
    assert code == 2 and words in err[-1]
