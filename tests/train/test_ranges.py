"""Running ranges of activations: what they follow, from when to when, and what else of a run they leave alone."""

import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import TrainConfig
from r1jax.models.quantized import RANGED, observing
from r1jax.ops.quantize import quantize
from r1jax.train.quantized import path_of
from r1jax.train.ranges import follow, split_ranges, with_ranges
from r1jax.train.step import NO_LIMIT, batch_gradients
from tests.train.experiment import Interrupted, make_experiment

FROZEN = 3
"""The first of six steps in which ranges do not move."""


@pytest.fixture(scope="module")
def run():
    flags = ("--quant", ".=int8:int8/running", "--train.quant_freeze", "0.5", "--model.dropout", "0.0")
    return make_experiment(*flags, file="tiny_language.py")


def ranges_of(params) -> dict[str, np.ndarray]:
    """Ranges by the names of their weights."""
    leaves = jax.tree_util.tree_leaves_with_path(split_ranges(jax.device_get(params))[0])
    return {f"{path_of(path[:-1])}/weight": x for path, x in leaves}


@pytest.fixture(scope="module")
def steps(run):
    """Ranges after each step, those of the average, and the largest inputs that each step must have met."""

    @jax.jit
    def largest(params, batch):
        found = {}
        with observing(lambda use: found.update({use.name: use.inputs} if use.role in RANGED else {})):
            run.model.apply({"params": params}, run.task.prepare(batch)[0], language=True)
        return {name: jnp.max(jnp.abs(x)) for name, x in found.items()}

    state, rows = run.init(), []
    for batch in run.batches(5):
        met = jax.device_get(largest(state.params, batch))
        state, metrics = run.step(state, batch, NO_LIMIT)
        assert metrics["refused"] == 0
        rows.append((met, ranges_of(state.params), ranges_of(state.ema)))
    return rows


def test_ranges_are_averages_of_the_largest_inputs(run, steps):
    expected = dict.fromkeys(steps[0][0], 0.0)
    for step, (met, held, _) in enumerate(steps[:FROZEN]):
        decay = min(0.99, (1 + step) / (10 + step))
        for name, new in met.items():
            expected[name] = decay * expected[name] + (1 - decay) * float(new) if step else float(new)
        assert held.keys() == expected.keys()
        for name, value in expected.items():  # the other program rounds a few numbers otherwise
            np.testing.assert_allclose(held[name], value, rtol=5e-3, err_msg=f"step {step}: {name}")
    assert any(abs(steps[0][1][name] / value - 1) > 0.05 for name, value in expected.items()), "nothing to follow"


def test_ranges_stay_once_they_are_frozen_and_are_those_of_the_averaged_weights(steps):
    for step, (_, held, averaged) in enumerate(steps):
        np.testing.assert_allclose([*averaged.values()], [*held.values()], rtol=1e-6)  # compilers may form them twice
        assert averaged == held or step < FROZEN
        assert (held == steps[FROZEN - 1][1]) == (step >= FROZEN - 1)


def test_parts_of_a_batch_have_the_ranges_of_the_whole(run, steps):
    """Largest inputs are no sums, and neither shrink nor grow with the scale of the loss."""
    parts = replace(run.config, train=replace(run.config.train, accumulation=2))
    batch, key, scale = run.batches(1)[0], jax.random.key(0), jnp.float32(1024)

    @jax.jit
    def take(params):
        return batch_gradients(parts, run.model, run.task, params, {}, batch, key, jnp.zeros(()), scale)[0]

    for name, value in ranges_of(take(run.fresh.params)).items():
        np.testing.assert_allclose(value, steps[0][1][name], rtol=5e-3, err_msg=name)


def test_a_run_that_goes_on_has_the_ranges_of_one_that_was_not_interrupted(run, tmp_path):
    whole, _, _ = run.train(tmp_path / "whole")
    run.train(tmp_path / "parts", step=Interrupted(run.step, 3, signal.SIGTERM))
    joined, said, _ = run.train(tmp_path / "parts")
    assert "00000003" in said[0]
    jax.tree.map(np.testing.assert_array_equal, joined, whole)


def test_ranges_wait_for_inputs_and_for_their_share_of_the_run():
    config = TrainConfig(steps=100, quant_start=0.2, quant_freeze=0.6)
    ranges = {"a": jnp.float32(0), "b": jnp.float32(2)}

    def after(step, a, b):
        return follow(ranges, {"a": jnp.float32(a), "b": jnp.float32(b)}, jnp.float32(step / 100), config)

    assert after(10, 0, 0) == after(30, 0, 0) == after(60, 3, 3) == ranges  # of floats, of no such input, frozen
    late = after(50, 3, 4)
    assert late["a"] == 3
    np.testing.assert_allclose(late["b"], 2 * 31 / 40 + 4 * 9 / 40, rtol=1e-6)
    late = follow(ranges, {"a": jnp.float32(3), "b": jnp.float32(4)}, jnp.float32(0.5), replace(config, steps=10_000))
    np.testing.assert_allclose(late["b"], 2 * 0.99 + 4 * 0.01, rtol=1e-6)


def test_codes_take_the_ranges_that_are_known():
    codes = {f"{name}/weight": quantize(jnp.ones((2, 4)), "int8") for name in ("a", "b", "experts")}
    ranges = {"a": {"input_range": jnp.float32(1.5)}, "b": {"input_range": jnp.float32(0)}}
    spans = {name: q.span for name, q in with_ranges(codes, ranges).items()}
    assert spans.pop("a/weight").tolist() == [[1.5]] and spans == {"b/weight": None, "experts/weight": None}
