import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.data.pipeline import Preprocessed, open_pipeline
from r1jax.data.preprocess.ct import fit, resample, window
from r1jax.data.schema import Field, Schema
from r1jax.errors import UserError

ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is not installed")


class Scans:
    name, fingerprint = "scans", "0"
    schema = Schema(
        (
            Field("case_id", "category"),
            Field("volume", "volume", "int16", (4, 6, 8)),
            Field("volume_spacing", "number", "float32", (3,)),
        )
    )

    def __init__(self, spacing=(2.0, 1.0, 0.5)):
        self.spacing = spacing

    def __len__(self):
        return 3

    def read_batch(self, indices):
        volume = np.random.default_rng(0).integers(-1024, 3000, (3, 4, 6, 8)).astype(np.int16)
        spacing = np.tile(np.array(self.spacing, np.float32), (len(indices), 1))
        return {"case_id": [str(i) for i in indices], "volume": volume[indices], "volume_spacing": spacing}


def through(text, **scans):
    source = Preprocessed(Scans(**scans), open_pipeline(text), 0)
    return source, source.read_batch(np.array([2, 0]))


@given(st.integers(-1500, 500), st.integers(1, 3000))
def test_window_by_its_definition(low, width):
    hu = np.arange(-2000, 3000, 7, dtype=np.int16)
    exact = np.clip((hu.astype(np.float64) - low) / width * 255, 0, 255)
    assert np.abs(window(hu, low, low + width) - exact).max() <= 0.501
    assert window(np.array([low, low + width], np.int16), low, low + width).tolist() == [0, 255]


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.lists(st.floats(0.3, 3.0), min_size=3, max_size=3),
    st.integers(0, 99),
)
def test_resampling_equals_scipy(shape, factors, seed):
    picture = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    factors = np.array(factors[: len(shape)])
    sizes = [max(1, round(n * f)) for n, f in zip(shape, factors, strict=True)]
    grids = [(np.arange(m) + 0.5) / f - 0.5 for m, f in zip(sizes, factors, strict=True)]
    expected = ndimage.map_coordinates(picture, np.meshgrid(*grids, indexing="ij"), order=1, mode="nearest")
    found = resample(picture, factors)
    assert found.shape == tuple(sizes) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_whole_numbers_are_rounded_and_do_not_wrap():
    edge = np.array([0, 255, 254, 1], np.uint8)
    assert resample(edge, np.array([2.0])).tolist() == [0, 64, 191, 255, 254, 191, 64, 1]
    assert resample(edge, np.array([1.0])).tolist() == edge.tolist()


def test_fit_cuts_and_pads_about_the_middle():
    assert fit(np.arange(5), (3,), -1).tolist() == [1, 2, 3]
    assert fit(np.arange(3), (6,), -1).tolist() == [-1, 0, 1, 2, -1, -1]


def test_a_pipeline_for_ct():
    source, batch = through("resample(1.0, size=(8, 6, 4))|window(-1000, 400)")
    assert batch["volume"].shape == (2, 8, 6, 4) and batch["volume"].dtype == np.uint8
    assert batch["volume_spacing"].tolist() == [[1, 1, 1]] * 2
    assert source.schema.select(["volume"]).fields[0] == Field("volume", "volume", "uint8", (8, 6, 4))
    free, batch = through("resample((1.0, 1.0, 0.25))")
    assert [scan.shape for scan in batch["volume"]] == [(8, 6, 16)] * 2
    assert free.schema.select(["volume"]).fields[0].shape == (None, None, None)


@pytest.mark.parametrize(
    ("text", "scans", "words"),
    [
        ("window(400, -1000)", {}, "low must be below high"),
        ("window|window", {}, "windowed already"),
        ("window(field='image')", {}, "no column 'image'"),
        ("resample(1.0, size=(8, 8))", {}, "size has 2 numbers, but 'volume' has 3 axes"),
        ("resample(1.0)", {"spacing": (0.0, 1.0, 1.0)}, "must be above 0"),
        ("resample(1.0)", {"spacing": (np.nan, 1.0, 1.0)}, "must be above 0"),
        ("resample(0.0001)", {}, "too many"),
    ],
)
def test_what_cannot_be_done_is_said(text, scans, words):
    with pytest.raises(UserError, match=words):
        through(text, **scans)
