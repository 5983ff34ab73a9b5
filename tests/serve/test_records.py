"""How many of the scored records were learned from, and what a reader of the figures is told."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq

from r1jax.config import Config, DataConfig, ModelConfig, TaskConfig
from r1jax.data.pipeline import original
from r1jax.serve.evaluate import Evaluation
from r1jax.serve.records import seen_in_training
from r1jax.tasks.records.task import RecordsTask
from tests.data.record_sets import write_credit, write_phrases, write_stocks


def seen(kind, trained, path, split, preprocess=""):
    """What is said of a part of a file after training on another."""
    modalities = ("text",) if kind == "sentiment" else ("table",)
    config = Config(
        model=ModelConfig(modalities=modalities),
        task=TaskConfig(name="records", records=kind),
        data=DataConfig(path=str(trained), preprocess=preprocess),
    )
    source = RecordsTask(config).source("train")
    meta = {"data": {"name": source.name, "fingerprint": original(source).fingerprint}}
    checkpoint = SimpleNamespace(meta=lambda: meta, config=lambda: config)

    def ask():
        scored = replace(config, data=replace(config.data, path=str(path), split=split))
        task = RecordsTask(scored)
        return seen_in_training(
            Evaluation(None, checkpoint, scored, task, None, None, 0.0), original(task.source(split))
        )

    return ask


def test_the_parts_of_the_same_file_are_told_apart(tmp_path):
    file = write_credit(tmp_path / "x.parquet")
    assert seen("credit", file, file, "val")() == (
        0,
        ["these records chose the checkpoint: the figures are somewhat optimistic"],
    )
    for split, count in (("train", 64), ("all", 80)):
        found, told = seen("credit", file, file, split)()
        assert found == 64 and told == [f"64 of these {count} records were learned from: figures are optimistic"]


def test_a_copy_and_a_file_that_shares_records_are_recognised(tmp_path):
    file, copy = write_phrases(tmp_path / "x.txt"), tmp_path / "copy.txt"
    lines = file.read_text().splitlines()
    (tmp_path / "part.txt").write_text("\n".join(["A new sentence@neutral", *lines[10:30]]))
    part = seen("sentiment", file, tmp_path / "part.txt", "all")
    count, told = part()
    task = RecordsTask(
        Config(
            task=TaskConfig(name="records", records="sentiment"),
            data=DataConfig(path=str(file)),
            model=ModelConfig(modalities=("text",)),
        )
    )
    rows = task.source("train").rows
    assert count == ((rows >= 10) & (rows < 30)).sum() > 0
    assert told == [f"{count} of these 21 records were learned from, as {file} has them too: figures are optimistic"]
    (tmp_path / "new.txt").write_text("A new sentence@neutral\n")
    assert seen("sentiment", file, tmp_path / "new.txt", "all")() == (0, [])
    moved = seen("sentiment", file, shutil.copy(file, copy), "all")
    assert moved()[0] == len(rows)
    assert seen("sentiment", file, file, "train", "text_clean")()[0] == len(rows)
    file.unlink()
    assert moved()[0] == len(rows)
    count, told = part()
    assert count is None and "are not here as they were: whether they are scored is unknown" in told[0]


def test_stocks_are_the_same_by_their_day_even_behind_a_shorter_history(tmp_path):
    folder, later = write_stocks(tmp_path / "set"), tmp_path / "later"
    shutil.copytree(folder, later)
    prices = pq.read_table(folder / "prices_raw.parquet")
    kept = prices["Date"].to_numpy() >= prices["Date"].to_numpy()[200]
    pq.write_table(prices.filter(pa.array(kept)), later / "prices_raw.parquet")
    ask = {split: seen("stocks", folder, later, split) for split in ("all", "test")}
    assert ask["test"]() == (0, [])
    count, _ = ask["all"]()
    learned = RecordsTask(
        Config(
            model=ModelConfig(modalities=("table",)),
            task=TaskConfig(name="records", records="stocks"),
            data=DataConfig(path=str(later)),
        )
    ).source("train")
    assert count == len(learned) > 0
