import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import Config, DecoderConfig, ModelConfig, TaskConfig, VisionConfig
from r1jax.data.synthetic import SyntheticCases
from r1jax.errors import UserError
from r1jax.models.r1 import R1
from r1jax.tasks.medical.batch import collate
from r1jax.tasks.medical.schema import RECORD_FIELDS
from r1jax.tasks.medical.task import Medical

ALL = ("volume", "image", "table", "text")
CONFIG = Config(
    model=ModelConfig(
        modalities=ALL,
        decoder=DecoderConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
        volume=VisionConfig(size=(8, 8, 8), stem_stride=4, widths=(8,), blocks=(1,), layers=0),
        image=VisionConfig(size=(8, 8), stem_stride=4, widths=(8,), blocks=(1,), layers=0),
        text_tokens=8,
    ),
    task=TaskConfig(fields=("nodule_present",), text_weight=0.0),
)
FIELDS = CONFIG.task.fields


@pytest.fixture
def raw() -> dict:
    """Two cases that have everything."""
    image = {"image": np.full((2, 8, 8), 7, np.uint8), "image_spacing": np.full((2, 2), 0.7, np.float32)}
    return SyntheticCases(0, 2, "test", (8, 8, 8)).read_batch(np.arange(2)) | image


def without(raw: dict, *gone: str) -> dict:
    return {key: value for key, value in raw.items() if key.removesuffix("_spacing") not in gone}


@pytest.mark.parametrize("name", ALL)
def test_a_modality_that_the_source_lacks_is_missing_in_every_case(raw, name):
    whole, found = collate(raw, CONFIG, FIELDS), collate(without(raw, name), CONFIG, FIELDS)
    assert found.keys() == whole.keys()
    for key in whole:
        assert (found[key].shape, found[key].dtype.kind) == (whole[key].shape, whole[key].dtype.kind) or key == "image"
        if name not in key:
            np.testing.assert_array_equal(found[key], whole[key])
    flag = "text_valid" if name == "text" else f"has_{name}"
    assert whole[flag].any() and not found[flag].any()
    if name in ("volume", "image"):
        assert not found[name].any() and (found[f"{name}_spacing"] == 1).all()
    if name == "table":
        assert found["table"].shape == (2, len(RECORD_FIELDS)) and np.isnan(found["table"]).all()


def test_a_lacking_modality_reads_like_a_hidden_one(raw):
    task = Medical(CONFIG)
    model = R1(CONFIG.model, task.heads)
    hidden = collate(raw, CONFIG, FIELDS) | {"has_volume": np.zeros(2, bool), "has_table": np.zeros(2, bool)}
    lacking = collate(without(raw, "volume", "table"), CONFIG, FIELDS)
    inputs = [task.prepare(jax.tree.map(jnp.asarray, batch))[0] for batch in (hidden, lacking)]
    params = jax.jit(model.init)(jax.random.key(0), inputs[0])
    answers = [jax.jit(model.apply)(params, each).heads["nodule_present"] for each in inputs]
    assert np.isfinite(answers[0]).all()
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-5)


def test_flags_of_the_source_are_kept(raw):
    found = collate(raw | {"has_image": np.array([True, False])}, CONFIG, FIELDS)
    assert found["has_image"].tolist() == [True, False] and found["has_volume"].all()


def test_a_case_without_anything_is_named(raw):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, modalities=("image", "table")))
    empty = without(raw, "image") | {"table": np.full((2, len(RECORD_FIELDS)), np.nan, np.float32)}
    with pytest.raises(UserError, match="'synthetic-test-000000' has none of the modalities"):
        collate(empty, config, FIELDS)
