import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from r1jax.data import shards as module
from r1jax.data.card import CARD, UNFINISHED
from r1jax.data.parquet import ParquetStore
from r1jax.data.schema import Field, Schema
from r1jax.data.shards import Origin, rows_of, write_shards
from r1jax.errors import UserError
from tests.data.parquet_sets import ORIGIN, SCHEMA, assert_rows, read_everything, refused, row, rows, write

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import sys
from tests.data.parquet_sets import write
write(sys.argv[1], 60, group_rows=2, shard_rows=4, advance=lambda count: print(count, flush=True))
"""
ASKING = CHILD.replace("flush=True", "flush=True) or sys.stdin.readline(")
"""Waits, after every file that is safe, until it may go on."""
SMALL_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))"


def child(folder: Path, *arguments: str, code: str = CHILD) -> subprocess.Popen:
    """Another process that writes; its standard output has a line for every file that is safe."""
    command = [sys.executable, "-c", code, str(folder), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_are_written_for_random_access_with_sums_and_dictionaries(tmp_path):
    card = write(tmp_path / "x")
    assert sorted(contents(tmp_path / "x")) == sorted([CARD, "README.md", *(shard.name for shard in card.shards)])
    assert [shard.rows for shard in card.shards] == [24, 24, 2]
    metadata = pq.read_metadata(tmp_path / "x/part-00000.parquet")
    columns = {metadata.row_group(0).column(n).path_in_schema: metadata.row_group(0).column(n) for n in range(6)}
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    assert all(column.has_offset_index for column in columns.values())
    assert columns["case_id"].has_dictionary_page and not columns["volume"].has_dictionary_page
    assert columns["age"].statistics.max == 7 and columns["volume"].statistics is None
    page = (tmp_path / "x/README.md").read_text()
    assert "50 rows in 3 Parquet files, 7 row groups" in page and "| volume | volume | int16 | 3 x 4 x 5 |" in page


@pytest.mark.parametrize(("numbers", "group"), [(4, 512), (2**12, 128), (2**18, 2), (2**20, 1)])
def test_row_groups_follow_the_size_of_a_row(tmp_path, numbers, group):
    schema = Schema((Field("x", "series", "float16", (numbers,)),))
    zeros = np.zeros(numbers, np.float16)
    card = write_shards(str(tmp_path), schema, lambda start: ({"x": zeros} for _ in range(start, 3)), 3, ORIGIN)
    assert card.group_rows == group and card.shard_rows % group == 0


def test_the_same_command_again_writes_nothing(tmp_path):
    card = write(tmp_path / "x")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "x").iterdir()}
    assert write(tmp_path / "x") == card
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "x").iterdir()} == before


def test_any_source_can_be_written(tmp_path):
    class Numbers:
        name, fingerprint, schema = "numbers", "f" * 64, SCHEMA

        def __len__(self):
            return 21

        def read_batch(self, indices):
            return SCHEMA.decode(SCHEMA.encode([row(n) for n in indices.tolist()])) | {"other": indices}

    gaps = Schema((Field("n", "number", "int16"), Field("on", "number", "bool")))
    source = Numbers()
    write_shards(str(tmp_path), SCHEMA, rows_of(source), len(source), Origin("numbers", "f", "c"), group_rows=4)
    assert_rows(read_everything(tmp_path), range(21))
    source.schema = gaps
    source.read_batch = lambda numbers: {"n": np.where(numbers % 2, numbers, np.nan), "on": numbers > 9}
    given = list(rows_of(source)(0))
    assert gaps.encode(given).column("n").to_pylist() == [n if n % 2 else None for n in range(21)]
    assert [value["on"] for value in given] == [n > 9 for n in range(21)]
    source.schema = SCHEMA
    del source.read_batch
    assert [given["target.size"] for given in rows_of(source)(19)] == [19, 20]


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("moment", range(0, 28, 2))
def test_after_a_crash_at_any_write_the_rest_is_the_same(tmp_path, monkeypatch, moment):
    write(tmp_path / "whole")
    left = [moment]

    def dies(original):
        def call(*arguments):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return original(*arguments)

        return call

    monkeypatch.setattr(os, "replace", dies(os.replace))
    monkeypatch.setattr(os, "fsync", dies(os.fsync))
    try:
        write(tmp_path / "x")
    except Killed:
        if not (tmp_path / "x" / CARD).exists():
            with pytest.raises(UserError):  # never taken for a whole data set
                ParquetStore.open(str(tmp_path / "x"))
    monkeypatch.undo()
    done: list[int] = []
    write(tmp_path / "x", advance=done.append)
    assert sum(done) == 50
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")


def test_killed_at_random_and_called_again_the_files_are_the_same(tmp_path):
    write(tmp_path / "whole", 60, group_rows=2, shard_rows=4)
    draw = random.Random(0)
    for _ in range(4):  # of 15 files, at most 12 are begun
        with child(tmp_path / "x", code=ASKING) as process:
            for _ in range(draw.randint(2, 3)):
                assert process.stdout.readline()
                process.stdin.write("go on\n")
                process.stdin.flush()
            time.sleep(draw.random() * 0.005)  # it is writing the next file, or waits after it
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert (tmp_path / "x" / UNFINISHED).exists() and not (tmp_path / "x" / CARD).exists()
    write(tmp_path / "x", 60, group_rows=2, shard_rows=4)
    left = {name: content for name, content in contents(tmp_path / "x").items() if not name.startswith(".")}
    assert left == contents(tmp_path / "whole")


def test_a_half_written_data_set_is_not_read(tmp_path):
    def rows_that_end(start):
        yield from (row(number) for number in range(start, 70))
        raise Killed

    with pytest.raises(Killed):
        write_shards(str(tmp_path / "x"), SCHEMA, rows_that_end, 90, ORIGIN, group_rows=8, shard_rows=24)
    refused(
        lambda: ParquetStore.open(str(tmp_path / "x")),
        "is not written to its end (48 of 90 rows)",
        "run the command",
        "a command",
    )


def test_a_full_disk_is_one_sentence_and_nothing_half_written_stays(tmp_path):
    write(tmp_path / "whole", 60, group_rows=2, shard_rows=4)
    size = max(path.stat().st_size for path in (tmp_path / "whole").glob("*.parquet"))
    code = CHILD.replace("import sys\n", f"import sys\n{SMALL_FILES}\n")
    with child(tmp_path / "x", str(size + 10), code=code) as process:  # the growing card does not fit
        said = process.communicate()[1]
    assert process.returncode != 0 and "is full" in said.splitlines()[-1] and "make room" in said
    assert not [path for path in (tmp_path / "x").iterdir() if path.name.startswith(".")]
    write(tmp_path / "x", 60, group_rows=2, shard_rows=4)
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_what_is_done(tmp_path, monkeypatch, number):
    calls = []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > 2:
            raise OSError(number, os.strerror(number))
        return replace(*arguments)

    replace = os.replace
    monkeypatch.setattr(os, "replace", full)
    refused(lambda: write(tmp_path / "x"), str(tmp_path / "x"), "after 1 of 3 files", "goes on from there")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    write(tmp_path / "x")
    before = contents(tmp_path / "x")
    other, sizes = Origin("another set", "1" * 64, "a command"), {"group_rows": 8, "shard_rows": 24}
    refused(lambda: write(tmp_path / "x", 49), "begun with rows 50, now it is 49", "another folder")
    refused(lambda: write_shards(str(tmp_path / "x"), SCHEMA, rows(50), 50, other, **sizes), "source")
    refused(lambda: write(tmp_path / "x", group_rows=4), "group_rows 8, now it is 4")
    assert contents(tmp_path / "x") == before
    for path in (tmp_path / "x").glob("*.json"):
        path.unlink()
    refused(lambda: write(tmp_path / "x"), "holds other Parquet files")
    (tmp_path / "file").write_text("")
    refused(lambda: write(tmp_path / "file"), "file")


def test_rows_that_end_early_or_do_not_fit_are_refused(tmp_path):
    refused(lambda: write_shards(str(tmp_path / "a"), SCHEMA, rows(20), 30, ORIGIN), "a set ended after 20 of 30 rows")
    bad = Schema((Field("age", "number", "float32"),))
    refused(lambda: write_shards(str(tmp_path / "b"), bad, rows(20), 20, ORIGIN), "which the schema lacks")
    refused(lambda: write_shards(str(tmp_path / "c"), SCHEMA, rows(0), 0, ORIGIN), "a set has no rows")
    assert module.GROUP_BYTES >= 2**16  # one group is worth a request
