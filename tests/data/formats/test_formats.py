"""A format is chosen by name, or recognised; every reader gives a source that survives pickling and threads."""

import io
import os
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from r1jax.data.formats import FORMATS, open_format
from r1jax.data.formats import files as data_files
from r1jax.data.formats.recognise import recognise
from r1jax.data.source import Source
from r1jax.errors import UserError


def png():
    file = io.BytesIO()
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(file, "PNG")
    return file.getvalue()


def npz():
    file = io.BytesIO()
    np.savez(file, x=np.zeros((2, 3)))
    return file.getvalue()


def wav():
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes(bytes(8))
    return file.getvalue()


MHA = (
    b"ObjectType = Image\nNDims = 3\nElementSpacing = 1 1 1\nDimSize = 2 2 2\nElementType = MET_UCHAR\n"
    b"ElementDataFile = LOCAL\n" + bytes(8)
)


@pytest.mark.parametrize(
    ("names", "format_name"),
    [
        ({"a/x.png": png, "b/y.PNG": png, "notes.txt": bytes}, "images"),
        ({"x.png": png, "labels.csv": lambda: b"file,y\nx.png,1\n"}, "images"),
        ({"x": png}, "images"),
        ({"x.csv": lambda: b"a,b\n1,2\n"}, "csv"),
        ({"x.csv": lambda: b"a,b\n1,2\n", "y.csv": lambda: b"a,b\n3,4\n"}, "series"),
        ({"x.npz": npz}, "npz"),
        ({"x.mha": lambda: MHA}, "mhd"),
        ({"x.nii.gz": bytes}, "nifti"),
        ({"s/IM0001": lambda: bytes(128) + b"DICM", "DICOMDIR": lambda: bytes(128) + b"DICM"}, "dicom"),
        ({"x.wav": wav}, "audio"),
    ],
)
def test_formats_are_recognised(tmp_path, names, format_name):
    for name, content in names.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content())
    assert recognise(tmp_path) == format_name
    if format_name in ("csv", "npz", "mhd", "audio", "series") or "labels.csv" in names or "a/x.png" in names:
        source = open_format("auto", str(tmp_path))
        assert isinstance(source, Source) and source.schema.names[0] == "case_id"
        assert source.fingerprint == open_format(format_name, tmp_path).fingerprint
        whole = source.read_batch(np.arange(len(source)))
        assert tuple(whole) == source.schema.names
        with ThreadPoolExecutor(4) as pool:
            for batch in pool.map(source.read_batch, [np.arange(len(source))] * 8):
                np.testing.assert_equal(batch, whole)
        with pytest.raises(IndexError):
            source.read_batch(np.array([len(source)]))
        assert source.read_batch(np.array([], np.int64))["case_id"] == []


def test_what_is_not_clear_is_asked_for(tmp_path):
    with pytest.raises(UserError, match="no folder or file"):
        open_format("auto", tmp_path / "none")
    with pytest.raises(UserError, match="has no file"):
        open_format("auto", tmp_path)
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(UserError, match="no file .* of a format"):
        open_format("auto", tmp_path)
    (tmp_path / "x.png").write_bytes(png())
    (tmp_path / "x.wav").write_bytes(wav())
    with pytest.raises(UserError, match="1 audio, 1 images"):
        open_format("auto", tmp_path)
    assert len(open_format("images", tmp_path)) == 1
    with pytest.raises(UserError, match="did you mean 'images'"):
        open_format("image", tmp_path)
    with pytest.raises(UserError, match="no option 'from' .did you mean 'form'"):
        open_format("images", tmp_path, **{"from": "pixels"})
    (tmp_path / "x.png").unlink()
    (tmp_path / "x.wav").unlink()
    (tmp_path / "x.csv").write_text("a\n1\n")
    (tmp_path / "y.csv").write_text("b\n1\n")
    with pytest.raises(UserError, match="different headers"):
        open_format("auto", tmp_path)


def test_a_large_data_set_is_known_by_sizes_and_times(tmp_path, monkeypatch):
    (tmp_path / "x.npz").write_bytes(npz())
    hashed = open_format("npz", tmp_path)
    os.utime(tmp_path / "x.npz", (1, 1))
    assert open_format("npz", tmp_path).fingerprint == hashed.fingerprint
    monkeypatch.setattr(data_files, "HASHED_BYTES", 10)
    first = open_format("npz", tmp_path)
    assert "sizes and times" in first.name
    os.utime(tmp_path / "x.npz", (2, 2))
    assert open_format("npz", tmp_path).fingerprint != first.fingerprint


def test_names_and_links_stay_inside(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.csv").write_text("a\n1\n")
    os.symlink(tmp_path / "secret.csv", tmp_path / "in/x.csv")
    os.symlink("loop.csv", tmp_path / "in/loop.csv")
    for name in (
        "../secret.csv",
        "x.csv",
        str(tmp_path / "secret.csv"),
        str(tmp_path / "in/x.csv"),
        "loop.csv",
        "a\0b",
    ):
        with pytest.raises(UserError, match="leads out|cannot be (read|followed)"):
            data_files.read_bytes(tmp_path / "in", name)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.raw")
    (tmp_path / "x.mhd").write_bytes(MHA.replace(b"LOCAL", b"x.raw"))
    with pytest.raises(UserError, match="x.raw is no file"):
        open_format("mhd", tmp_path)


def test_a_large_file_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "x.csv").open("wb") as file:
        file.truncate(data_files.MAX_BYTES + 1)
    with pytest.raises(UserError, match="more than 2147418112: split it"):
        open_format("csv", tmp_path)


def test_names_that_are_no_text_are_named(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.csv", "wb") as file:
        file.write(b"a\n1\n")
    with pytest.raises(UserError, match="not UTF-8: rename"):
        open_format("csv", tmp_path)


def test_every_format_is_in_the_page():
    page = (Path(__file__).parents[3] / "docs/formats.md").read_text("utf-8")
    assert [name for name in FORMATS if f"| `{name}` |" not in page] == []
