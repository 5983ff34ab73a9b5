"""Sounds come as float samples, the same with and without soundfile; damaged files are refused."""

import io
import pickle
import struct
import wave

import numpy as np
import pytest

from r1jax.data.formats import audio
from r1jax.data.formats.audio import open_audio
from r1jax.errors import UserError

soundfile = pytest.importorskip("soundfile")
RNG = np.random.default_rng(0)


def pcm(width, frames=40, channels=1, rate=8000):
    """A WAV file by the standard library, and its samples as floats."""
    whole = RNG.integers(-(2 ** (8 * width - 1)), 2 ** (8 * width - 1), (frames, channels))
    shifted = whole + 128 if width == 1 else whole
    raw = shifted.astype("<i8").view(np.uint8).reshape(frames, channels, 8)[..., :width]
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(width)
        out.setframerate(rate)
        out.writeframes(raw.tobytes())
    return file.getvalue(), (whole / 2.0 ** (8 * width - 1)).astype(np.float32)


def everything(source):
    return source.read_batch(np.arange(len(source)))


@pytest.mark.parametrize("with_soundfile", [True, False])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_are_what_was_written(tmp_path, monkeypatch, width, with_soundfile):
    if not with_soundfile:
        monkeypatch.setattr(audio.importlib.util, "find_spec", lambda name: None)
    data, want = pcm(width)
    (tmp_path / "a.wav").write_bytes(data)
    batch = everything(pickle.loads(pickle.dumps(open_audio(tmp_path))))
    np.testing.assert_array_equal(batch["audio"][0], want[:, 0])
    assert batch["audio"][0].dtype == np.float32 and batch["rate"].tolist() == [8000]


@pytest.mark.parametrize(("kind", "subtype"), [("wav", "FLOAT"), ("wav", "DOUBLE"), ("flac", "PCM_24"), ("mp3", None)])
def test_other_kinds_are_read_by_soundfile(tmp_path, monkeypatch, kind, subtype):
    want = (0.5 * np.sin(np.arange(16000) / 20)).astype(np.float32)
    soundfile.write(tmp_path / f"a.{kind}", want, 16000, subtype=subtype)
    found = everything(open_audio(tmp_path))
    assert found["rate"].tolist() == [16000]
    # MP3 is lossy, and pads at both ends.
    np.testing.assert_allclose(found["audio"][0][: len(want)], want, atol=0.05 if kind == "mp3" else 2**-23)
    monkeypatch.setattr(audio.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"r1jax\[audio\]"):
        everything(open_audio(tmp_path))


def test_extensible_files_are_read(tmp_path):
    data, want = pcm(3)
    guid = struct.pack("<H", 1) + bytes.fromhex("000000001000800000aa00389b71")
    fmt = struct.pack("<HHIIHHHHI", 0xFFFE, 1, 8000, 24000, 3, 24, 22, 24, 4) + guid
    body = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + data[36:]
    (tmp_path / "a.wav").write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    np.testing.assert_array_equal(everything(open_audio(tmp_path))["audio"][0], want[:, 0])


def test_labels_come_from_folders_and_names(tmp_path):
    for name in ("cat/3_ann_0.wav", "dog/7_bob_1.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(pcm(2)[0])
    pattern = r"(?P<digit>\d)_(?P<speaker>[a-z]+)_\d"
    batch = everything(open_audio(tmp_path, pattern=pattern))
    assert batch["case_id"] == ["cat/3_ann_0.wav", "dog/7_bob_1.wav"]
    assert (batch["label"], batch["digit"], batch["speaker"]) == (["cat", "dog"], ["3", "7"], ["ann", "bob"])
    with pytest.raises(UserError, match="does not match"):
        open_audio(tmp_path, pattern=r"(?P<digit>3)_.*")
    with pytest.raises(UserError, match="no regular expression"):
        open_audio(tmp_path, pattern="(")


def test_channels_are_averaged_only_if_asked(tmp_path):
    data, want = pcm(2, channels=2)
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(UserError, match="2 channels"):
        open_audio(tmp_path)
    source = open_audio(tmp_path, mix=True)
    assert "averaged" in source.name
    np.testing.assert_allclose(everything(source)["audio"][0], want.mean(1), rtol=1e-6)


def test_damaged_wav_files_are_refused(tmp_path):
    good, _ = pcm(2)

    def patched(place, new):
        return good[:place] + new + good[place + len(new) :]

    bad = {
        "empty": b"",
        "text": b"text",
        "no RIFF": patched(0, b"RIFX"),
        "only a head": good[:44],
        "cut short": good[:-2],
        "half": good[:60],
        "rate": patched(24, struct.pack("<I", 8001)),
        "channels": patched(22, struct.pack("<H", 2)),
        "bits": patched(34, struct.pack("<H", 8)),
        "code": patched(20, struct.pack("<H", 7)),
        "less data": patched(40, struct.pack("<I", 60)),
        "a chunk's name": patched(36, b"d\xffta"),
        "two formats": good + good[12:36],
    }
    for data in bad.values():
        (tmp_path / "a.wav").write_bytes(data)
        with pytest.raises(UserError, match=r"a\.wav"):
            everything(open_audio(tmp_path))
    soundfile.write(tmp_path / "a.wav", np.array([0, np.nan, 1], np.float32), 8000, subtype="FLOAT")
    with pytest.raises(UserError, match="NaN"):
        everything(open_audio(tmp_path))


def test_chunks_that_nobody_knows_are_passed_over(tmp_path):
    good, want = pcm(2)
    (tmp_path / "a.wav").write_bytes(good[:36] + b"LIST\x03\0\0\0abc\0" + good[36:] + b"id3 \x02\0\0\0xy")
    np.testing.assert_array_equal(everything(open_audio(tmp_path))["audio"][0], want[:, 0])


def test_flac_that_is_cut_short_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.flac", RNG.normal(0, 0.1, 30000), 8000)
    data = (tmp_path / "a.flac").read_bytes()
    for part in (data[: len(data) // 2], data[:100], b""):
        (tmp_path / "a.flac").write_bytes(part)
        with pytest.raises(UserError, match=r"a\.flac"):
            everything(open_audio(tmp_path))
