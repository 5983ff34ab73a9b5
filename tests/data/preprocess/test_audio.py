import math

import numpy as np
import pytest

from r1jax.data.pipeline import Preprocessed, open_pipeline
from r1jax.data.preprocess.audio import log_mel, mel_filters
from r1jax.data.schema import Field, Schema
from r1jax.errors import UserError


def by_definition(wave, rate, bands, window, hop):
    """Log-mel spectrogram in plain sums: Fourier's, the window's, and the triangles'."""
    mel = lambda f: 2595 * math.log10(1 + f / 700)  # noqa: E731
    corners = [700 * (10 ** (mel(rate / 2) * i / (bands + 1) / 2595) - 1) for i in range(bands + 2)]
    rows = []
    for start in range(0, max(len(wave) - window, 0) + 1, hop):
        part = [wave[start + n] if start + n < len(wave) else 0.0 for n in range(window)]
        part = [x * math.sin(math.pi * n / window) ** 2 for n, x in enumerate(part)]
        power = []
        for k in range(window // 2 + 1):
            turn = [2 * math.pi * ((k * n) % window) / window for n in range(window)]
            real = sum(x * math.cos(a) for x, a in zip(part, turn, strict=True))
            imaginary = sum(x * math.sin(a) for x, a in zip(part, turn, strict=True))
            power.append(real**2 + imaginary**2)
        row = []
        for low, middle, high in zip(corners, corners[1:], corners[2:], strict=False):
            total = 0.0
            for k, p in enumerate(power):
                f = k * rate / window
                if low < f <= middle:
                    total += p * (f - low) / (middle - low)
                elif middle < f < high:
                    total += p * (high - f) / (high - middle)
            row.append(math.log(max(total, 1e-10)))
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize(
    ("samples", "rate", "bands", "window", "hop"), [(150, 8000, 8, 64, 20), (30, 16000, 5, 48, 16)]
)
def test_log_mel_by_its_definition(samples, rate, bands, window, hop):
    wave = np.random.default_rng(samples).normal(size=samples).astype(np.float32)
    expected = by_definition(wave.tolist(), rate, bands, window, hop)
    np.testing.assert_allclose(log_mel(wave, rate, bands, window, hop), expected, rtol=1e-4, atol=1e-4)


def test_a_tone_is_loudest_in_its_band():
    rate, window = 16000, 400
    middles = mel_filters(rate, 40, window).argmax(axis=0) * rate / window
    for frequency in (500.0, 1000.0, 4000.0):
        wave = np.sin(2 * np.pi * frequency * np.arange(rate) / rate).astype(np.float32)
        loudest = log_mel(wave, rate, 40, window, 160).mean(axis=0).argmax()
        assert loudest == np.abs(middles - frequency).argmin()


class Waves:
    name, fingerprint = "waves", "0"

    def __init__(self, samples):
        self.schema = Schema((Field("case_id", "category"), Field("audio", "audio", "float32", (samples,))))

    def __len__(self):
        return 2

    def read_batch(self, indices):
        waves = [np.ones(1000, np.float32), np.ones(1000, np.float32)]
        return {"case_id": ["a", "b"], "audio": np.stack(waves) if self.schema.fields[1].shape[0] else [waves[0], None]}


def test_shapes_are_declared():
    pipeline = open_pipeline("log_mel(bands=10, window=100, hop=50)")
    fixed = Preprocessed(Waves(1000), pipeline, 0)
    assert fixed.schema.fields[1].shape == (19, 10)
    assert fixed.read_batch(np.arange(2))["audio"].shape == (2, 19, 10)
    free = Preprocessed(Waves(None), pipeline, 0).read_batch(np.arange(2))["audio"]
    assert free[0].shape == (19, 10) and free[1] is None


def test_impossible_numbers_are_refused():
    with pytest.raises(UserError, match="bands at most half of window"):
        open_pipeline("log_mel(bands=300)")
