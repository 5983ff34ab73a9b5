"""A conversion that was cut off goes on with the same source alone: nothing of another is mixed in."""

import os

import numpy as np
import pytest
from PIL import Image

from r1jax.__main__ import dispatch
from r1jax.data import shards
from r1jax.data.card import CARD
from tests.data.folders import images, write
from tests.data.parquet_sets import read_everything, refused


def picture(path, seed):
    Image.fromarray(images(1, seed)[0]).save(path, "BMP")  # not compressed: the size stays


def records(path, last):
    path.write_text("\n".join(["case_id,age", *(f"{n},6{n % 10}" for n in range(11)), f"11,{last}"]), "utf-8")


def make(kind, folder):
    """Writes twelve cases; returns the words that convert them, and what changes the last of them."""
    if kind == "cases":
        write(folder, image=images(12))
        return [folder], lambda: write(folder, image=np.concatenate([images(12)[:11], images(1, 1)]))
    folder.mkdir()
    for number in range(12):
        picture(folder / f"{number}.bmp", number)
    words = [folder, "--format", "images", "--options", "form='pixels'"]
    if kind == "pictures":
        return words, lambda: picture(folder / "11.bmp", 99)
    if kind == "a picture more":
        return words, lambda: picture(folder / "12.bmp", 99)
    table = folder.parent / "records.csv"
    records(table, 40)
    return [*words, "--join", table], lambda: records(table, 41)


@pytest.mark.parametrize("kind", ["cases", "pictures", "a picture more", "a joined table"])
def test_a_source_that_changed_since_a_conversion_was_cut_off_is_refused(tmp_path, monkeypatch, kind):
    words, change = make(kind, tmp_path / "source")
    kept = {path: (path.read_bytes(), path.stat()) for path in tmp_path.rglob("*.*") if path.is_file()}
    out = tmp_path / "out"
    command = ["data", "convert", *map(str, words[:1]), str(out), *map(str, words[1:]), "--group-rows", "2"]
    command += ["--shard-rows", "4"]
    write_shard = shards._shard

    def cut(name, *more):
        if name == "part-00002.parquet":
            raise KeyboardInterrupt
        return write_shard(name, *more)

    monkeypatch.setattr(shards, "_shard", cut)
    with pytest.raises(KeyboardInterrupt):
        dispatch(command)
    monkeypatch.undo()
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {"part-00000.parquet", "part-00001.parquet"} < written.keys()

    change()
    for path, (_, stat) in kept.items():  # times tell nothing: a copy may keep them
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    told = "rows 12, now it is 13" if kind == "a picture more" else "fingerprint"
    refused(lambda: dispatch(command), str(out), "was begun with", told, "empty this one")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == written and not (out / CARD).exists()

    for path in tmp_path.rglob("source/*"):
        path.unlink()
    for path, (content, _) in kept.items():
        path.write_bytes(content)
    assert dispatch(command) == 0 and len(read_everything(out)) == 12  # the same again goes on
