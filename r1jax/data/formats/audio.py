"""Audio: a folder of WAV, FLAC and MP3 files as float samples."""

import functools
import importlib.util
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from r1jax.data.formats import wav
from r1jax.data.formats.cases import CASE_ID, FileCases, file_cases
from r1jax.data.formats.files import MAX_BYTES, class_folders, file_size, inside, list_files, read_bytes
from r1jax.data.schema import Field
from r1jax.errors import UserError

SUFFIXES = (".wav", ".flac", ".mp3")
HEADER_BYTES = 2**16


def open_audio(path: str | Path, pattern: str | None = None, mix: bool = False) -> FileCases:
    r"""Opens a folder of sound files as a source.

    Args:
      path: The folder. The first folder in each name is the class, column `label`.
      pattern: Regular expression that the names without suffix match; its named groups are columns, such as
        `(?P<digit>\d)_(?P<speaker>[a-z]+)_.*`.
      mix: Averages the channels of files that have several.

    Returns:
      `audio` float32 [T] and `rate` in samples a second, as recorded.

    Raises:
      UserError: A file is damaged, has several channels without `mix`, needs soundfile, or does not match the pattern.
    """
    root, names = list_files(path, SUFFIXES, "sound file")
    known: list[tuple[Field, Sequence[str] | Sequence[int]]] = [(CASE_ID, names)]
    labels = class_folders(root, names)
    known += [(Field("label", "category"), labels)] if labels is not None else []
    known += _groups(root, names, pattern) if pattern is not None else []
    headers = [_header(root, name) for name in names]
    for name, header in zip(names, headers, strict=True):
        if header.channels > 1 and not mix:
            raise UserError(f"{root / name} has {header.channels} channels: average them with mix=True, or split them")
        if header.frames * header.channels * 4 > MAX_BYTES:
            raise UserError(f"{root / name} has {header.frames} samples: split it")
    known.append((Field("rate", "number", "int32"), [header.rate for header in headers]))
    what = "audio, channels averaged" if any(header.channels > 1 for header in headers) else "audio"
    read = functools.partial(_read, root, tuple(names), tuple(headers))
    return file_cases(root, names, what, known, [Field("audio", "audio", "float32", (None,))], read)


def _groups(root: Path, names: Sequence[str], pattern: str) -> list[tuple[Field, list[str]]]:
    """Takes the named groups of a pattern as categories."""
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise UserError(f"pattern {pattern!r} is no regular expression ({error}): repair it") from error
    found = []
    for name in names:
        match = wanted.fullmatch(name.rsplit("/", 1)[-1].rsplit(".", 1)[0])
        if match is None:
            raise UserError(f"the name of {root / name} does not match {pattern!r}: rename it, or mend the pattern")
        found.append(match.groupdict(default=""))
    return [(Field(group, "category"), [groups[group] for groups in found]) for group in wanted.groupindex]


def _header(root: Path, name: str) -> wav.Header:
    size = file_size(root, name)
    if name.lower().endswith(".wav"):
        head = read_bytes(root, name, HEADER_BYTES)
        try:
            return wav.read_header(head, size, str(root / name))
        except UserError:
            if size == len(head):
                raise
            return wav.read_header(read_bytes(root, name), size, str(root / name))
    soundfile = _soundfile(root / name)
    if size > MAX_BYTES:
        raise UserError(f"{root / name} has {size} bytes, more than {MAX_BYTES}: split it")
    try:
        found = soundfile.info(str(inside(root, name)))
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        raise _broken(root / name, str(error)) from error
    if found.frames <= 0 or found.samplerate <= 0:
        raise _broken(root / name, "it has no samples")
    return wav.Header(found.samplerate, found.channels, found.frames)


def _soundfile(file: Path):  # the type is the module itself
    if importlib.util.find_spec("soundfile") is None:
        raise UserError(f"{file} needs soundfile: pip install 'r1jax[audio]'")
    import soundfile

    return soundfile


def _read(root: Path, names: tuple[str, ...], headers: tuple[wav.Header, ...], row: int) -> dict[str, np.ndarray]:
    data, file, known = read_bytes(root, names[row]), root / names[row], headers[row]
    is_wav = names[row].lower().endswith(".wav")
    if is_wav and wav.read_header(data, len(data), str(file)) != known:
        raise UserError(f"{file} has changed since it was opened: open the folder again")
    if is_wav and importlib.util.find_spec("soundfile") is None:
        samples = wav.read_pcm(data, str(file))
    else:
        samples, rate = _decode(data, file)
        if rate != known.rate:
            raise UserError(f"{file} has changed since it was opened: open the folder again")
    if samples.shape != (known.frames, known.channels):
        raise _broken(file, f"{len(samples)} of {known.frames} samples could be read")
    if not np.isfinite(samples).all():
        raise _broken(file, "samples are NaN or infinite")
    return {"audio": samples[:, 0] if known.channels == 1 else samples.mean(axis=1, dtype=np.float32)}


def _decode(data: bytes, file: Path) -> tuple[Float[np.ndarray, "T channels"], int]:
    soundfile = _soundfile(file)
    try:
        return soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        raise _broken(file, str(error)) from error


def _broken(file: Path, why: str) -> UserError:
    return UserError(f"{file} is damaged or no sound file ({why}): write or copy it again")
