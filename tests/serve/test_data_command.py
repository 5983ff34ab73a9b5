import numpy as np
import pytest

from r1jax.__main__ import dispatch
from r1jax.data.parquet import ParquetStore
from r1jax.serve import data_command
from tests.data.folders import images, write
from tests.data.parquet_sets import SCHEMA, assert_rows, read_everything, refused, row
from tests.data.parquet_sets import write as write_parquet


@pytest.fixture
def cases(tmp_path):
    return write(tmp_path / "cases", image=images(20), label=np.arange(20) % 2, case_id=np.arange(20))


def test_a_folder_of_cases_is_converted_described_and_verified(cases, tmp_path, capsys):
    output = str(tmp_path / "parquet")
    words = ["data", "convert", str(cases), output, "--group-rows", "4", "--shard-rows", "8"]
    assert dispatch(words) == 0
    said = capsys.readouterr()
    assert "20 rows in 3 files" in said.out and "rows 20/20" in said.err
    assert dispatch(["data", "info", output]) == 0
    said = capsys.readouterr().out
    assert "20 rows in 3 files" in said and "5 row groups of 4 to 4 rows" in said
    assert f"r1jax {' '.join(words)}" in said and "every byte" in said
    assert any(line.split() == ["image", "image", "uint8", "5", "x", "7"] for line in said.splitlines())
    assert dispatch(["data", "verify", output]) == 0
    assert "all 3 files are as they were written" in capsys.readouterr().out
    assert dispatch(words) == 0  # again: nothing to do
    assert len(ParquetStore.open(output)) == 20


def test_damage_is_named_file_by_file(tmp_path):
    folder = tmp_path / "parquet"
    write_parquet(folder)
    for number, change in enumerate([lambda c: c[:-5] + b"x" + c[-4:], lambda c: c + b"x", None]):
        path = folder / f"part-0000{number}.parquet"
        path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
    words = ("3 of 3 files", "part-00000.parquet holds other bytes", "part-00001.parquet has", "part-00002.parquet is")
    refused(lambda: dispatch(["data", "verify", str(folder)]), *words)


def test_files_of_other_writers_are_verified_as_far_as_they_can_be(tmp_path, capsys):
    write_parquet(tmp_path)
    (tmp_path / "dataset.json").unlink()
    assert dispatch(["data", "verify", str(tmp_path)]) == 0
    assert "all 50 rows can be read; the sums of all pages are right" in capsys.readouterr().out
    path = tmp_path / "part-00001.parquet"
    content = bytearray(path.read_bytes())
    content[400] ^= 1
    path.write_bytes(content)
    refused(lambda: dispatch(["data", "verify", str(tmp_path)]), "part-00001.parquet", "damaged")


def test_other_formats_are_converted_from_their_sources(tmp_path, monkeypatch):
    class Numbers:
        name, fingerprint, schema = "numbers", "f" * 64, SCHEMA

        def __len__(self):
            return 21

        def read_batch(self, indices):
            return SCHEMA.decode(SCHEMA.encode([row(n) for n in indices.tolist()]))

    known = {("audio", "recordings"): Numbers()}
    monkeypatch.setattr(data_command, "open_format", lambda kind, path, **options: known[kind, path])
    assert dispatch(["data", "convert", "recordings", str(tmp_path / "x"), "--format", "audio"]) == 0
    assert_rows(read_everything(tmp_path / "x"), range(21))


def test_wrong_words_are_refused(cases, tmp_path):
    refused(lambda: dispatch(["data", "convert", str(cases)]), "no output was named", "r1jax data convert my_cases")
    refused(lambda: dispatch(["data", "convert", str(cases), "x", "--format", "casses"]), "cases")
    refused(lambda: dispatch(["data", "info", str(tmp_path / "none")]), str(tmp_path / "none"), "no such folder")
    refused(lambda: dispatch(["data", "info", str(cases)]), "no .parquet file", "r1jax data convert")
    refused(lambda: dispatch(["data", "convert", str(tmp_path / "none"), "x", "--format", "cases"]), "no folder")
