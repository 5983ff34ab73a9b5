import numpy as np
import pytest

from r1jax.data.pipeline import Preprocessed, open_pipeline
from r1jax.data.schema import Field, Schema
from r1jax.errors import UserError


class Tables:
    """Columns far from 0, with gaps, one constant and one that nobody knows."""

    name, fingerprint = "tables", "0"
    schema = Schema((Field("case_id", "category"), Field("table", "table", "float32", (4,))))

    def __init__(self, seed, count):
        rng = np.random.default_rng(seed)
        self.values = (rng.normal(size=(count, 4)) * [1, 100, 0, 1] + [1e4, -5, 7, 0]).astype(np.float32)
        self.values[rng.random((count, 4)) < 0.2] = np.nan
        self.values[:, 3] = np.nan

    def __len__(self):
        return len(self.values)

    def read_batch(self, indices):
        return {"case_id": [str(i) for i in indices], "table": self.values[indices]}


def test_columns_are_scaled_by_the_training_part():
    training, other, pipeline = Tables(0, 200), Tables(1, 50), open_pipeline("scale")
    pipeline.fit(training)
    known = training.values.astype(np.float64)
    scaled = Preprocessed(training, pipeline, 0).read_batch(np.arange(200))["table"]
    assert scaled.dtype == np.float32 and np.array_equal(np.isnan(scaled), np.isnan(known))
    assert np.nanmean(scaled[:, :2], axis=0) == pytest.approx([0, 0], abs=1e-5)
    assert np.nanstd(scaled[:, :2], axis=0) == pytest.approx([1, 1], abs=1e-5)
    assert np.nanmax(np.abs(scaled[:, 2])) == 0
    elsewhere = Preprocessed(other, pipeline, 0).read_batch(np.arange(50))["table"]
    expected = (other.values[:, :2] - np.nanmean(known[:, :2], axis=0)) / np.nanstd(known[:, :2], axis=0)
    np.testing.assert_allclose(elsewhere[:, :2], expected, rtol=1e-4, atol=1e-4)
    assert pipeline.provenance()["statistics"]["0"]["known"] == np.sum(~np.isnan(known), axis=0).tolist()


def test_other_parts_are_never_fitted():
    with pytest.raises(UserError, match="scale .* is fitted on the training part alone"):
        Preprocessed(Tables(1, 9), open_pipeline("scale"), 0)


def test_words_are_not_scaled():
    pipeline = open_pipeline("scale('case_id')")
    pipeline.steps[0].run.statistics = {}
    with pytest.raises(UserError, match="'case_id' is category .*, not rows of floats"):
        Preprocessed(Tables(1, 9), pipeline, 0)
