"""One step computed in 1 part and in 8: the same loss, gradients and loads, with everything random in it."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import Config
from r1jax.errors import UserError
from r1jax.models.r1 import R1
from r1jax.tasks.catalog import TASKS
from r1jax.train.accumulate import divide, sum_over
from r1jax.train.step import batch_gradients
from r1jax.validation import validate
from tests.train import tiny as medical
from tests.train import tiny_language as language
from tests.train.experiment import optax_promotes


def uneven(batch):
    """Findings unknown in most cases, pictures that are lacking, texts of every length."""
    batch = {k: np.array(v) for k, v in batch.items()}
    for name, known in (("nodule_present", 5), ("malignancy", 1), ("center_mm", 3), ("texture", 0)):
        if (target := f"target.{name}") in batch:
            batch[target][:known], batch[target][known:] = 1.0, np.nan
    if "has_volume" in batch:
        batch["has_volume"][[1, 6]] = False
    batch["text_valid"] &= np.arange(batch["text"].shape[1])[None] < 2 * np.arange(8)[:, None]
    return batch


def experiment(config: Config):
    """The config with what makes parts of a batch unlike each other, and a batch."""
    config = replace(
        config,
        task=replace(config.task, label_smoothing=0.1, augment="affine", balance_weight=0.1, z_loss=0.01),
        train=replace(config.train, batch_size=8),
    )
    task = TASKS[config.task.name](config)
    return config, task, uneven(task.collate(task.source("train").read_batch(np.arange(8))))


@pytest.fixture(scope="module", params=[medical, language], ids=["medical", "language"])
def computed(request):
    """(gradients, loss, parts, loads) by the number of parts."""
    config, task, batch = experiment(request.param.get_config())
    model, found = R1(config.model, task.heads), {}
    with optax_promotes():
        inputs = jax.eval_shape(lambda: task.prepare(jax.tree.map(jnp.asarray, batch)))[0]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
        params = jax.jit(lambda: model.init(jax.random.key(0), zeros, language=task.language)["params"])()
        for count in (1, 8):
            parts = replace(config, train=replace(config.train, accumulation=count))
            take = jax.jit(
                lambda batch, c=parts: batch_gradients(
                    c, model, task, params, {}, batch, jax.random.key(3), jnp.asarray(0.5)
                )
            )
            found[count] = jax.device_get(take(batch))
    return found


def test_parts_add_up_to_the_whole(computed):
    (gradients, loss, parts, loads, _), (slopes, total, each, counts, _) = computed[1], computed[8]
    assert loss > 0 and parts.keys() == each.keys()
    np.testing.assert_allclose(total, loss, rtol=1e-6)
    for name, value in parts.items():
        np.testing.assert_allclose(each[name], value, rtol=1e-6, err_msg=name)
    for a, b in zip(loads, counts, strict=True):
        np.testing.assert_array_equal(a, b)
    size = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(gradients)))
    error = jax.tree.map(lambda a, b: np.sum(np.square(a.astype(np.float64) - b)), gradients, slopes)
    assert np.sqrt(sum(jax.tree.leaves(error))) < 1e-6 * size
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(slopes), strict=True):
        assert np.abs(a - b).max() <= 3e-6 * np.abs(a).max() + 1e-9 * size, jax.tree_util.keystr(path)


def test_what_nobody_knows_costs_nothing_and_the_rest_is_a_mean_over_what_is_known(computed):
    parts = computed[8][2]
    if "texture" in parts:
        assert parts["texture"] == 0 and parts["malignancy"] > 0 and parts["where"] > 0
    else:
        assert parts["next"] > 0 and parts["mtp"] > 0


def test_neighbours_are_spread_over_the_parts():
    parts = divide({"x": jnp.arange(12).reshape(6, 2)}, 3)["x"]
    np.testing.assert_array_equal(parts[:, :, 0], [[0, 6], [2, 8], [4, 10]])


def test_sums_are_formed_in_fp32():
    parts = jnp.full((300, 1), 1.0, jnp.bfloat16)  # bf16 stops counting at 256
    total = sum_over(lambda part: {"a": part[0], "n": jnp.int32(1)}, parts)
    assert total["a"].dtype == jnp.float32 and total["a"] == 300
    assert total["n"].dtype == jnp.int32 and total["n"] == 300


def test_a_batch_that_cannot_be_divided():
    config = replace(medical.get_config(), train=replace(medical.get_config().train, accumulation=3))
    with pytest.raises(
        UserError, match=r"train.batch_size is 8, but it must be a multiple of train.accumulation \(3\)"
    ):
        validate(config)


def test_parts_round_with_bits_of_their_own(monkeypatch):
    def apply(model, variables, inputs, *, rngs, **rest):
        return SimpleNamespace(slope=variables["params"]["w"] * jax.random.uniform(rngs["rounding"]), router=())

    config, task, batch = experiment(language.get_config())
    monkeypatch.setattr(R1, "apply", apply)
    monkeypatch.setattr(type(task), "loss", lambda task, output, *rest: (output.slope, {}))
    model, arguments, found = R1(config.model, task.heads), (jax.random.key(3), jnp.zeros(())), {}
    for count in (1, 2):
        parts = replace(config, train=replace(config.train, accumulation=count))
        found[count] = batch_gradients(parts, model, task, {"w": jnp.ones(())}, {}, batch, *arguments)[0]["w"]
    assert found[2] > 0 and abs(found[2] - 2 * found[1]) > 1e-3
