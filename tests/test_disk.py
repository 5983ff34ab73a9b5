import hashlib
import os

import pytest

from r1jax.disk import flush, sha256


def test_files_and_folders_are_flushed(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"abc")
    seen = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (seen.append(os.fstat(number).st_ino), fsync(number)))
    for path in (tmp_path / "x", tmp_path):
        flush(path)
        assert seen.pop() == path.stat().st_ino
    with pytest.raises(FileNotFoundError):
        flush(tmp_path / "nothing")


def test_sums_are_those_of_the_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()
