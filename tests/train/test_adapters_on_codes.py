"""Adapters on frozen codes: what is trained, what is kept, what goes on, and what is served of it."""

import signal

import jax
import numpy as np
import pytest

from r1jax.models.lora import split_adapters
from r1jax.train.quantized import is_codes
from tests.train.experiment import Interrupted, make_experiment

FLAGS = ("--quant", "experts=int4", "int8", "--model.lora_rank", "2", "--model.dropout", "0.0")


@pytest.fixture(scope="module")
def experiment():
    return make_experiment(*FLAGS, file="tiny_language.py")


@pytest.fixture(scope="module")
def trained(experiment, tmp_path_factory):
    """A finished run: its folder and its last state."""
    folder = tmp_path_factory.mktemp("run")
    return folder, experiment.train(folder)[0]


def frozen(tree):
    return split_adapters(tree)[1]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float64), np.asarray(y, np.float64))


def test_weights_are_codes_without_moments_and_adapters_alone_move(experiment, trained):
    fresh, (_, last) = experiment.fresh, trained
    held = [x for x in jax.tree.leaves(fresh.params, is_leaf=is_codes) if is_codes(x)]
    narrow, floats = sum(x.values.nbytes for x in held), sum(x.nbytes for x in jax.tree.leaves(frozen(fresh.params)))
    assert narrow > 0.85 * floats - sum(x.scale.nbytes for x in held), "something large was left in floats"
    adapters = sum(x.size for x in jax.tree.leaves(split_adapters(fresh.params)[0]))
    moments = sum(x.size for x in jax.tree.leaves(fresh.optimizer) if x.ndim)
    assert moments == 2 * adapters
    assert_same(frozen(last.params), frozen(fresh.params))
    assert_same(frozen(last.ema), frozen(fresh.params))
    assert not any(
        np.array_equal(a, b)
        for a, b in zip(*(jax.tree.leaves(split_adapters(x.params)[0]) for x in (last, fresh)), strict=True)
    )


def test_a_run_goes_on_bit_for_bit(experiment, trained, tmp_path):
    stop = Interrupted(experiment.step, 4, signal.SIGTERM)
    assert experiment.train(tmp_path, step=stop)[2]
    assert_same(experiment.train(tmp_path)[0], trained[1])
