from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import pytest

from r1jax.data.source import Source
from r1jax.tasks.medical.modes import MODES
from r1jax.tasks.medical.task import Medical
from r1jax.train.evaluation import Evaluator
from tests.train.experiment import Experiment


@dataclass
class Fixed(Source):
    """Some cases of another source, with arrays replaced."""

    inner: Source
    count: int
    change: Any = None

    def __len__(self):
        return self.count

    def read_batch(self, indices):
        raw = self.inner.read_batch(indices)
        return raw if self.change is None else {**raw, **self.change(raw)}


@pytest.fixture(scope="module")
def params(tiny):
    """Weights away from their start, where queries and heads are almost nothing."""
    leaves, tree = jax.tree.flatten(jax.device_get(tiny.fresh.params))
    rng = np.random.default_rng(0)
    moved = [x + 0.1 * rng.normal(size=x.shape).astype(x.dtype) for x in leaves]
    return jax.device_put(jax.tree.unflatten(tree, moved))


@pytest.fixture(scope="module")
def predict(tiny: Experiment, params):
    def run(source, batch_size=8, modes=tuple(MODES)):
        return tiny.evaluator.predict(params, source, batch_size=batch_size, modes=modes)

    return run


def test_every_case_once_and_in_order(tiny, predict):
    source = Fixed(tiny.validation, 13)
    predicted, targets, ids = predict(source)
    raw = tiny.validation.read_batch(np.arange(13))
    assert ids == list(raw["case_id"])
    assert set(predicted) == set(MODES)
    for name in tiny.config.task.fields:
        assert all(len(found[name]) == 13 for found in predicted.values())
        np.testing.assert_array_equal(targets[name], raw[f"target.{name}"])


def test_padding_changes_nothing(tiny, predict):
    whole, _, _ = predict(Fixed(tiny.validation, 16))
    part, _, _ = predict(Fixed(tiny.validation, 13))
    for mode, name in [(mode, name) for mode in MODES for name in tiny.config.task.fields]:
        np.testing.assert_array_equal(part[mode][name], whole[mode][name][:13])


def test_predictions_are_those_of_the_model(tiny, params, predict):
    found, _, _ = predict(Fixed(tiny.validation, 8), modes=("both",))
    batch = jax.device_put(tiny.task.collate(tiny.validation.read_batch(np.arange(8))))
    inputs, _ = tiny.task.prepare(batch)
    expected = tiny.task.predict(jax.jit(tiny.model.apply)({"params": params}, inputs).heads)
    for name in tiny.config.task.fields:
        np.testing.assert_allclose(found["both"][name], expected[name], rtol=2e-4, atol=1e-5, err_msg=name)


def test_modes_show_what_they_say(tiny, predict):
    cases = 8
    other_image = lambda raw: {"volume": raw["volume"][::-1].copy()}  # noqa: E731
    other_record = lambda raw: {"table": raw["table"][::-1].copy(), "text": raw["text"][::-1]}  # noqa: E731
    plain, _, _ = predict(Fixed(tiny.validation, cases))
    images, _, _ = predict(Fixed(tiny.validation, cases, other_image))
    records, _, _ = predict(Fixed(tiny.validation, cases, other_record))
    name = "nodule_present"
    np.testing.assert_array_equal(plain["record_only"][name], images["record_only"][name])
    np.testing.assert_array_equal(plain["image_only"][name], records["image_only"][name])
    for changed, modes in ((images, ("both", "image_only")), (records, ("both", "record_only"))):
        for mode in modes:
            assert np.abs(plain[mode][name] - changed[mode][name]).max() > 1e-4, mode


def test_views_are_averaged(tiny, params):
    task = Medical(replace(tiny.config, task=replace(tiny.config.task, views=2)))
    source = Fixed(tiny.validation, 8)
    found, _, _ = Evaluator(tiny.model, task, tiny.mesh).predict(params, source, batch_size=8, modes=("both",))
    inputs, _ = task.prepare(jax.device_put(task.collate(source.read_batch(np.arange(8)))))
    apply = jax.jit(tiny.model.apply)
    views = [task.predict(apply({"params": params}, turned).heads) for turned, _ in task.views(inputs)]
    assert len(views) == 2
    mean = np.mean([view["nodule_present"] for view in views], axis=0)
    np.testing.assert_allclose(found["both"]["nodule_present"], mean, rtol=2e-4, atol=1e-5)


def test_centres_come_back_in_the_frame_of_the_given_picture(tiny, predict):
    """One more voxel at the end of each axis is cut off again: only the middle that centres count from has moved."""

    def grown(raw):
        return {"volume": np.pad(raw["volume"], [(0, 0), *[(0, 1)] * 3], constant_values=-1000)}

    found, _, _ = predict(Fixed(tiny.validation, 8))
    other, targets, _ = predict(Fixed(tiny.validation, 8, grown))
    raw = tiny.validation.read_batch(np.arange(8))
    moved = found["both"]["center_mm"] - 0.5 * raw["volume_spacing"]
    np.testing.assert_allclose(other["both"]["center_mm"], moved, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(targets["center_mm"], raw["target.center_mm"])
    np.testing.assert_array_equal(other["both"]["nodule_present"], found["both"]["nodule_present"])
