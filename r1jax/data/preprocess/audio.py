"""Log-mel spectrograms of sound."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float32

from r1jax.data.plugins import Case, Preprocessor
from r1jax.data.schema import Field, Schema
from r1jax.errors import UserError


@dataclass
class LogMel(Preprocessor):
    """Turns a waveform into the logarithm of its mel spectrogram [frames, bands].

    Attributes:
      rate: Samples a second of the waveform.
      bands: Mel bands.
      window: Samples a frame (a Hann window); the length of the Fourier transform.
      hop: Samples from one frame to the next.
      field: Name of the waveform, float32 [samples]; the spectrogram takes its place.
    """

    rate: int = 16000
    bands: int = 80
    window: int = 400
    hop: int = 160
    field: str = "audio"
    modality: ClassVar[str] = "audio"

    def __post_init__(self) -> None:
        """Refuses what gives no spectrogram.

        Raises:
          UserError: A number is too small, or there are more bands than frequencies to fill them.
        """
        if min(self.rate, self.bands, self.window, self.hop) < 1 or self.bands > self.window // 2:
            raise UserError("rate, bands, window and hop must be at least 1, and bands at most half of window")

    def output(self, schema: Schema) -> Schema:
        """Samples become frames and bands.

        Raises:
          UserError: The field is no waveform.
        """
        before = schema.select([self.field]).fields[0]
        if len(before.shape) != 1:
            raise UserError(f"{self.field!r} has {len(before.shape)} axes, a waveform has one")
        samples = before.shape[0]
        frames = None if samples is None else frame_count(samples, self.window, self.hop)
        after = Field(self.field, "audio", "float32", (frames, self.bands))
        return Schema(tuple(after if f.name == self.field else f for f in schema.fields))

    def process(self, case: Case) -> Case:
        """Transforms the waveform of a case; a missing one stays missing."""
        wave = case[self.field]
        if wave is None:
            return case
        return {**case, self.field: log_mel(wave, self.rate, self.bands, self.window, self.hop)}


def frame_count(samples: int, window: int, hop: int) -> int:
    """Frames of a waveform: whole ones only, and at least one."""
    return 1 + max(samples - window, 0) // hop


def log_mel(
    wave: Float32[np.ndarray, " samples"], rate: int, bands: int, window: int, hop: int
) -> Float32[np.ndarray, "frames bands"]:
    """Log-mel spectrogram.

    Args:
      wave: Samples, -1 to 1.
      rate: Samples a second.
      bands: Mel bands.
      window: Samples a frame.
      hop: Samples from frame to frame.

    Returns:
      Natural logarithm of the power in each band, at least log(1e-10).
    """
    wave = np.pad(wave, (0, max(window - len(wave), 0)))
    frames = np.lib.stride_tricks.sliding_window_view(wave, window)[::hop]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    power = np.abs(np.fft.rfft(frames * hann, axis=1)) ** 2
    return np.log(np.maximum(power @ mel_filters(rate, bands, window), 1e-10)).astype(np.float32)


def mel_filters(rate: int, bands: int, window: int) -> np.ndarray:
    """Triangles whose corners are evenly spaced on the mel scale 2595 log10(1 + f / 700) from 0 to half the rate.

    Args:
      rate: Samples a second.
      bands: Triangles.
      window: Length of the Fourier transform.

    Returns:
      Weights [window // 2 + 1, bands], 1 at the middle of each triangle.
    """
    top = 2595 * math.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)
    frequencies = np.arange(window // 2 + 1)[:, None] * rate / window
    rise = (frequencies - corners[:-2]) / np.diff(corners)[:-1]
    fall = (corners[2:] - frequencies) / np.diff(corners)[1:]
    return np.maximum(np.minimum(rise, fall), 0)
