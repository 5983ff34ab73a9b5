"""Precision policies in training: what is stored in what, overflows and the recovery from them, checkpoints."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from r1jax.train.checkpoint import abstract_like
from r1jax.train.checkpoints import write_sealed
from r1jax.train.scaling import FIRST_SCALE, GROWTH_INTERVAL, LossScale, ScaledState, first_scale, next_scale
from r1jax.train.step import NO_LIMIT
from tests.train.experiment import make_experiment

FLAGS = ("--task.balance_weight", "0.01", "--train.warmup_steps", "0", "--model.dropout", "0")


def build(*flags):
    return make_experiment(*FLAGS, *flags, file="tiny_language.py")


def train(experiment, steps, state=None):
    """Losses of steps over the same few batches, and the last state."""
    state = experiment.init() if state is None else state
    batches, losses = experiment.batches(4), []
    for i in range(steps):
        state, metrics = experiment.step(state, batches[i % 4], NO_LIMIT)
        losses.append(jax.device_get(metrics))
    return state, losses


@pytest.fixture(scope="module")
def exact():
    return build()


@pytest.fixture(scope="module")
def half():
    return build("--model.precision", "fp16")


@pytest.fixture(scope="module")
def pure():
    return build("--model.precision", "bf16_pure")


def same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def with_scale(state, scale, good=0):
    return state._replace(
        optimizer=ScaledState(state.optimizer.optimizer, LossScale(jnp.float32(scale), jnp.int32(good), jnp.int32(0)))
    )


def test_an_overflow_changes_nothing_but_the_scale(half):
    before = jax.device_get(with_scale(half.init(), 2.0**60, good=7))
    state, (figures,) = train(half, 1, jax.device_put(before))
    assert same(*((x.params, x.optimizer.optimizer, x.ema) for x in (state, before)))
    assert int(state.step) == 1 and [float(x) for x in state.optimizer.scaling] == [2.0**24, 0, 1]
    assert np.isfinite(figures["loss"]) and figures["skipped"] == 1 and figures["gradient_norm"] == 0


def test_training_recovers_from_overflows(half):
    state, figures = train(half, 40, with_scale(half.init(), 2.0**24))
    assert 0 < figures[-1]["skipped"] < 15 and figures[-1]["skipped"] == figures[-10]["skipped"]
    assert figures[-1]["loss"] < 0.9 * figures[0]["loss"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state)))


def test_gradients_in_fp16_are_those_of_fp32(exact, half):
    """The scale is divided out again: the norm of the gradient, before it is clipped, is that of fp32."""
    (_, (wide,)), (_, (narrow,)) = train(exact, 1), train(half, 1)
    np.testing.assert_allclose(narrow["loss"], wide["loss"], rtol=2e-3)
    np.testing.assert_allclose(narrow["gradient_norm"], wide["gradient_norm"], rtol=2e-2)


def test_the_scale_follows_its_rule():
    yes, no = jnp.asarray(True), jnp.asarray(False)
    scale = first_scale()
    for _ in range(3):
        scale = next_scale(scale, yes)
    assert (float(scale.scale), int(scale.good)) == (FIRST_SCALE, 3)
    full = scale._replace(good=jnp.int32(GROWTH_INTERVAL - 1))
    assert [float(x) for x in next_scale(full, yes)] == [2 * FIRST_SCALE, 0, 0]
    assert [float(x) for x in next_scale(full, no)] == [FIRST_SCALE / 2, 0, 1]
    assert float(next_scale(scale._replace(scale=jnp.float32(1)), no).scale) == 1


def dtypes(tree):
    return {str(x.dtype) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)}


def test_what_is_stored_in_what(exact, half, pure):
    for experiment in (exact, half):
        assert dtypes(experiment.fresh) == {"float32"}
    state, _ = train(pure, 1)
    for tree in (pure.fresh, state):
        assert dtypes(tree.optimizer) == {"bfloat16"} and dtypes(tree.ema) == {"float32"}
        for path, x in jax.tree_util.tree_leaves_with_path(tree.params):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            wide = x.ndim < 2 or ".gate." in name
            assert x.dtype == (jnp.float32 if wide else jnp.bfloat16), name


def test_pure_bf16_learns_like_fp32(exact, pure):
    (_, wide), (_, narrow) = train(exact, 40), train(pure, 40)
    assert narrow[-1]["loss"] < 0.9 * narrow[0]["loss"]
    np.testing.assert_allclose(narrow[-1]["loss"], wide[-1]["loss"], rtol=0.05)


def test_moments_in_bf16_learn_like_fp32(exact):
    narrow = build("--train.moments", "bfloat16")
    state, figures = train(narrow, 40)
    assert dtypes(state.optimizer) == {"bfloat16"} and dtypes(state.params) == {"float32"}
    np.testing.assert_allclose(figures[-1]["loss"], train(exact, 40)[1][-1]["loss"], rtol=0.02)


def save(path, state, experiment):
    return write_sealed(path / "00000003", state, experiment.config, {"versions": {"r1jax": "0"}})


def placed(state):
    return abstract_like(state, jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), state))


@pytest.mark.parametrize("kind", ["exact", "half", "pure"])
def test_a_checkpoint_keeps_scale_and_types(kind, request, tmp_path):
    experiment = request.getfixturevalue(kind)
    state, _ = train(experiment, 2)
    found = save(tmp_path, state, experiment).restore(placed(experiment.fresh))
    assert same(found, state) and jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, state)
