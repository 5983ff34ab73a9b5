"""Checks the structure of WAV files, which decoders read past in silence, and decodes PCM without a library."""

import io
import struct
import wave
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from r1jax.errors import UserError

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
BITS = {PCM: (8, 16, 24, 32), FLOAT: (32, 64)}


@dataclass(frozen=True)
class Header:
    """What a sound file holds.

    Attributes:
      rate: Samples a second.
      channels: Samples at one time.
      frames: Times.
    """

    rate: int
    channels: int
    frames: int


def read_header(data: bytes, size: int, where: str) -> Header:
    """Reads the header of a WAV file, and holds its numbers against each other and against the size of the file.

    Args:
      data: The file, or its beginning with at least the header.
      size: Of the whole file in bytes.
      where: Its name, for the error message.

    Returns:
      Rate, channels and length.

    Raises:
      UserError: It is no WAV file of PCM or floats, cut short, or its numbers contradict each other.
    """
    if len(data) < 12 or data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise UserError(f"{where} is damaged or no WAV file (RIFF): write or copy it again")
    place, found = 12, {}
    while place < size:
        head = data[place : place + 8]
        if len(head) < 8 or not all(32 <= letter < 127 for letter in head[:4]):
            raise _broken(where, f"no chunk at byte {place}")
        name, length = head[:4], int.from_bytes(head[4:], "little")
        if name in found or place + 8 + length > size:
            raise _broken(where, f"chunk {name.decode()!r} is there twice" if name in found else "it is cut short")
        if name in (b"fmt ", b"data"):
            found[name] = (place + 8, length)
        place += 8 + length + length % 2
        if name == b"data" and size > len(data):
            break  # only the beginning of the file is here; reading the case looks at the rest
    if len(found) < 2:
        raise _broken(where, "it has no format or no samples")
    start, length = found[b"fmt "]
    return _numbers(data[start : start + length], found[b"data"][1], where)


def _numbers(head: bytes, length: int, where: str) -> Header:
    """Reads the chunk `fmt ` and compares what it says twice."""
    if len(head) < 16:
        raise _broken(where, "its format is cut short")
    code, channels, rate, byte_rate, frame, bits = struct.unpack("<HHIIHH", head[:16])
    if code == EXTENSIBLE and len(head) >= 26:
        code = int.from_bytes(head[24:26], "little")
    if bits not in BITS.get(code, ()):
        raise UserError(f"{where} holds samples of code {code} with {bits} bits: save it as PCM or float WAV, or FLAC")
    if not channels or not rate or frame != channels * bits // 8 or byte_rate != rate * frame or length % frame:
        raise _broken(where, "its rate, channels, bits and lengths contradict each other")
    if not length:
        raise _broken(where, "it has no samples")
    return Header(rate, channels, length // frame)


def read_pcm(data: bytes, where: str) -> Float[np.ndarray, "T channels"]:
    """Decodes PCM of 8, 16, 24 or 32 bits with the standard library.

    Args:
      data: The file.
      where: Its name, for the error message.

    Returns:
      float32, -1 <= sample < 1.

    Raises:
      UserError: The samples are floats or of the extensible format, which need soundfile.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            width, channels = file.getsampwidth(), file.getnchannels()
            raw = np.frombuffer(file.readframes(file.getnframes()), np.uint8).reshape(-1, width)
    except (wave.Error, EOFError) as error:
        raise UserError(f"{where} cannot be read ({error}): pip install 'r1jax[audio]'") from error
    if width == 1:  # the only width without a sign
        raw = raw ^ np.uint8(0x80)
    wide = np.zeros((len(raw), 4), np.uint8)
    wide[:, 4 - width :] = raw
    samples = wide.view("<i4").astype(np.float64) / 2.0**31
    return samples.astype(np.float32).reshape(-1, channels)


def _broken(where: str, why: str) -> UserError:
    return UserError(f"{where} is damaged ({why}): write or copy it again")
