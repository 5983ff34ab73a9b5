"""How many of the scored sequences were trained on, and what a reader of the figures is told."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from r1jax.config import Config, DataConfig, ModelConfig, TaskConfig
from r1jax.serve.evaluate import Evaluation
from r1jax.serve.language import seen_in_training
from r1jax.tasks.language.task import Language

CONFIG = Config(
    model=ModelConfig(modalities=("text",), text_tokens=8),
    task=TaskConfig(name="language"),
    data=DataConfig(train_cases=8, val_cases=4, test_cases=4),
)


@pytest.fixture
def texts(tmp_path):
    """Documents of seven tokens, so that each has a sequence of its own; one is in two parts."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, letters in (("train", "ab"), ("val", "c"), ("test", "db")):
        for letter in letters:
            (folder / f"{name}_{letter}.txt").write_text(letter * 5)
    return folder


def seen(trained, path, split, imported=False):
    """What is said of a part of a text after training on another."""
    data = replace(CONFIG.data, path=trained and str(trained))
    source = Language(replace(CONFIG, data=data)).source("train")
    meta = {"data": {"name": source.name, "fingerprint": source.fingerprint}}

    def ask():
        config = replace(CONFIG, data=replace(CONFIG.data, path=path and str(path), split=split))
        checkpoint = SimpleNamespace(imported=imported, meta=lambda: meta, config=lambda: replace(CONFIG, data=data))
        task = Language(config)
        return seen_in_training(Evaluation(None, checkpoint, config, task, None, None, 0.0), task.source(split))

    return ask


def test_sequences_are_counted_by_their_documents(texts):
    for split, expected in (("train", 2), ("val", 0), ("test", 1), ("all", 3)):
        count, warnings = seen(texts, texts, split)()
        assert count == expected
        assert [w for w in warnings if "seen in training" in w] == warnings[: int(expected > 0)]
        assert any("val chose the checkpoint" in w for w in warnings) == (split in ("val", "all"))


def test_a_copy_is_recognised(texts, tmp_path):
    ask = seen(texts, shutil.copytree(texts, tmp_path / "copy"), "all")
    assert ask()[0] == 3
    shutil.rmtree(texts)
    assert ask()[0] == 3


def test_other_text_has_not_been_seen_but_for_what_it_shares(texts, tmp_path):
    (tmp_path / "other.txt").write_text("e" * 5)
    assert seen(texts, tmp_path / "other.txt", "all")() == (0, [])
    (tmp_path / "part.txt").write_text("a" * 5)
    assert seen(texts, tmp_path / "part.txt", "all")()[0] == 1


def test_what_cannot_be_known_is_said(texts, tmp_path):
    (tmp_path / "other.txt").write_text("e" * 5)
    ask = seen(texts, tmp_path / "other.txt", "all")
    (texts / "train_a.txt").write_text("f" * 5)
    count, (warning,) = ask()
    assert count is None and "is not here as it was: whether it is scored here is unknown" in warning
    assert seen(texts, tmp_path / "other.txt", "all", imported=True)() == (None, [])


def test_generated_text(texts):
    assert seen(None, None, "test")() == (0, [])
    assert seen(None, None, "train")()[0] == len(Language(CONFIG).source("train"))
    assert seen(None, texts, "all")() == (0, [])
    count, (warning,) = seen(None, None, "val")()
    assert count == 0 and "val chose the checkpoint" in warning
