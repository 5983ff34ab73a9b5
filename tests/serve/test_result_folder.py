import subprocess
import sys

import pytest

from r1jax.errors import UserError
from r1jax.serve.result_folder import result_folder


def test_the_new_result_takes_the_place_of_the_earlier_one(tmp_path):
    for text in ("first", "second"):
        with result_folder(tmp_path / "deep/out") as folder:
            (folder / "metrics.json").write_text(text)
    assert (tmp_path / "deep/out/metrics.json").read_text() == "second"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_keeps_the_earlier_result(tmp_path, error):
    with result_folder(tmp_path / "out") as folder:
        (folder / "metrics.json").write_text("first")
    with pytest.raises(error), result_folder(tmp_path / "out") as folder:
        (folder / "metrics.json").write_text("half")
        raise error
    assert (tmp_path / "out/metrics.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
    (tmp_path / ".out.earlier").mkdir()
    (tmp_path / ".out.earlier/metrics.json").write_text("first")
    (tmp_path / ".out.draft/reports").mkdir(parents=True)
    with pytest.raises(RuntimeError), result_folder(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == []
        raise RuntimeError
    assert (tmp_path / "out/metrics.json").read_text() == "first"


@pytest.mark.parametrize("name", ["notes.txt", "reports/scan.dcm", ".git"])
def test_foreign_files_are_never_replaced(tmp_path, name):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(UserError, match=name), result_folder(tmp_path / "out"):
        pass
    assert file.read_text() == "mine"


def test_a_file_or_a_link_is_no_result(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(UserError, match="not a folder"), result_folder(tmp_path / name):
            pass


def test_two_processes_do_not_write_to_one_place(tmp_path):
    code = (
        "from pathlib import Path; from r1jax.serve.result_folder import result_folder\n"
        f"with result_folder(Path({str(tmp_path / 'out')!r})): pass"
    )
    with result_folder(tmp_path / "out") as folder:
        (folder / "metrics.json").write_text("mine")
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "another process is writing" in other.stderr
    assert (tmp_path / "out/metrics.json").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output"), result_folder(tmp_path / "file/out"):
        pass
