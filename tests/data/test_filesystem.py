import pickle

import pyarrow.fs
import pytest

from r1jax.data.files import Files
from r1jax.data.filesystem import is_remote, open_filesystem
from tests.data.parquet_sets import refused


@pytest.mark.parametrize(
    ("url", "kind", "path"),
    [
        ("/data/a b", pyarrow.fs.LocalFileSystem, "/data/a b"),
        ("file:///data/a%20b", pyarrow.fs.LocalFileSystem, "/data/a b"),
        ("hdfs://127.0.0.1:1/data/x", pyarrow.fs.PyFileSystem, "/data/x"),
        ("hdfs://127.0.0.1:1", pyarrow.fs.PyFileSystem, "/"),
        ("s3://bucket/data/?region=eu-west-1", pyarrow.fs.S3FileSystem, "bucket/data"),
        ("gs://bucket/data", pyarrow.fs.GcsFileSystem, "bucket/data"),
    ],
)
def test_urls_name_a_file_system_and_a_path(url, kind, path):
    if kind is pyarrow.fs.PyFileSystem:
        pytest.importorskip("hdfs_native")
    filesystem, found = open_filesystem(url)
    assert isinstance(filesystem, kind) and found == path
    assert is_remote(url) == (kind is not pyarrow.fs.LocalFileSystem)


def test_relative_paths_are_those_of_the_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert open_filesystem("a/b")[1] == str(tmp_path / "a/b")
    assert open_filesystem("~/b")[1] == "/home/somebody/b"


def test_urls_that_cannot_work_are_refused():
    refused(lambda: open_filesystem("ftp://host/x"), "ftp://host/x", "no client", "hdfs:")
    refused(lambda: open_filesystem("s3://bucket/x?colour=red"), "'colour'", "endpoint_override")
    said = refused(lambda: open_filesystem("s3://key:secret@bucket/x"), "s3://bucket/x", "environment")
    assert "secret" not in said


def test_a_missing_client_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "hdfs_native.fsspec", None)
    refused(lambda: open_filesystem("hdfs://127.0.0.1:1/x"), "hdfs-native", "pip install 'r1jax[hdfs]'")


def test_files_of_a_folder_are_listed_without_hidden_ones(tmp_path):
    for name in ("b/y", "a", "b/.draft-z", "_logs/x", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"123")
    assert Files(str(tmp_path)).listing() == [("a", 3), ("b/y", 3)]
    refused(Files(str(tmp_path / "none")).listing, str(tmp_path / "none"), "no such folder")


@pytest.fixture(params=["disk", "hdfs", "s3"])
def place(request, tmp_path) -> str:
    """URL of a folder that is not there yet."""
    if request.param == "disk":
        return str(tmp_path / "folder")
    base = request.getfixturevalue("hdfs").url if request.param == "hdfs" else request.getfixturevalue("s3_url")
    return f"{base}/{tmp_path.name}"


def test_files_are_written_replaced_read_and_removed(place):
    files = Files(place)
    files.publish("a/x.parquet", b"0123456789")
    before = files.stamp("a/x.parquet")
    assert files.read("a/x.parquet", [(2, 3), (8, 5)]) == [b"234", b"89"]
    files.publish("a/x.parquet", b"something else")
    assert files.stamp("a/x.parquet") != before
    again = pickle.loads(pickle.dumps(files))
    assert again.read_all("a/x.parquet") == b"something else"
    assert again.listing() == [("a/x.parquet", 14)]
    assert again.find("a/nothing") is None and again.find("a/x.parquet") == b"something else"
    files.remove("a/x.parquet")
    files.remove("a/x.parquet")
    assert files.find("a/x.parquet") is None
    refused(lambda: files.read_all("a/x.parquet"), f"{place}/a/x.parquet")
