"""The shipped language experiment as a user runs it: trained by the command, scored by eval.py, started from again."""

import json
import sys
from pathlib import Path

import pytest

import eval as evaluate
from r1jax.__main__ import dispatch
from r1jax.cli import load_config
from r1jax.errors import UserError, run_main
from tests.train.experiment import one_device

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "configs" / "language.py")


@pytest.fixture(scope="module")
def trained(trainings, tmp_path_factory):
    """Folder of the smoke run, and what it printed."""
    folder = tmp_path_factory.mktemp("language")
    out, err = folder / "out", folder / "err"
    process = trainings.start(out, err, "--config", f"{CONFIG}:smoke", "--workdir", folder / "run")
    assert process.wait(200) == 0, err.read_text("utf-8")
    return folder / "run", out.read_text("utf-8")


def score(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, words)])
    monkeypatch.setattr(evaluate, "make_mesh", lambda _: one_device())
    with pytest.raises(SystemExit) as left:
        run_main(evaluate.main)
    return left.value.code


def test_the_smoke_run_closes_with_its_figures(trained):
    folder, said = trained
    assert "nats/token, the entropy of the generator" in said and "bits/byte" in said and "tokens seen" in said
    assert f"next             python eval.py --checkpoint {folder}" in said
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["validation.text.loss"] < 5.0


def test_eval_scores_it_on_its_own_data_and_on_other_text(trained, monkeypatch, capsys, tmp_path):
    folder, _ = trained
    assert score(monkeypatch, "--checkpoint", folder, "--resamples", 50) == 0
    metrics = json.loads((folder / "eval" / "metrics.json").read_text())
    loss = metrics["figures"]["loss"]
    assert loss["low"] < loss["value"] < loss["high"] and "nats/token" in capsys.readouterr().out
    assert metrics["best_attainable"]["loss"] < loss["value"] and metrics["warnings"] == []
    assert metrics["provenance"]["data"]["split"] == "test" and metrics["provenance"]["checkpoint"]["step"] == 20
    (tmp_path / "other.txt").write_text("Something else entirely.\n" * 20)
    words = ("--data.path", tmp_path / "other.txt", "--output", tmp_path / "out", "--resamples", 50)
    assert score(monkeypatch, "--checkpoint", folder, *words) == 0
    other = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert other["provenance"]["data"]["split"] == "all" and other["best_attainable"] == {}
    assert other["figures"]["loss"]["value"] > 0


def test_the_run_writes_text_and_so_does_its_export(trained, capsys, tmp_path):
    words = ["--prompt", "Ada has 3 肺", "--max_new_tokens", "8", "--page_size", "8"]
    assert dispatch(["hf", "export", str(trained[0]), str(tmp_path / "out")]) == 0
    capsys.readouterr()
    said = []
    for folder in (trained[0], tmp_path / "out"):
        assert dispatch(["generate", str(folder), *words]) == 0
        shown = capsys.readouterr()
        said.append(shown.out)
        assert "14 tokens read" in shown.err  # of 11 characters, one of three bytes, and the token of the beginning
    assert said[0] == said[1] and (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_variant_starts_from_a_checkpoint(trained):
    config = load_config(["--config", f"{CONFIG}:init={trained[0]}"]).config
    assert config.train.init == str(trained[0]) and config.model.decoder.hidden_size == 32
    with pytest.raises(UserError, match="init nowhere does not exist"):
        load_config(["--config", f"{CONFIG}:init=nowhere"])
