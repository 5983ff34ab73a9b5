"""Rounding by what it does to outputs."""

import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.data.synthetic import SyntheticCases
from r1jax.errors import UserError
from r1jax.ops.quantize import dequantize, quantize
from r1jax.serve.quantize_weights import calibration_batch, gptq, output_error

RNG = np.random.default_rng(0)


def inputs(rows, width):
    """Correlated inputs of a calibration set, as activations are."""
    return RNG.standard_normal((rows, 6)) @ RNG.standard_normal((6, width)) + 0.1 * RNG.standard_normal((rows, width))


@pytest.mark.parametrize("block", [None, 8])
def test_gptq_changes_outputs_less_than_rounding_to_nearest_does(block):
    weight, x = RNG.standard_normal((12, 32)), inputs(256, 32)
    nearest = quantize(jnp.asarray(weight, jnp.float32), "int4", block=block, scale_dtype=jnp.bfloat16)
    better = gptq(weight, x.T @ x, nearest)
    assert better.values.dtype == jnp.int8 and np.abs(better.values).max() <= 7
    assert better.scale.dtype == jnp.bfloat16 and better.scale.shape == nearest.scale.shape
    errors = [np.sum((x @ (weight - np.asarray(dequantize(q), np.float64)).T) ** 2) for q in (better, nearest)]
    assert errors[0] < 0.4 * errors[1]
    assert np.isclose(output_error(weight, better, x.T @ x), errors[0])


def test_inputs_that_are_independent_leave_nothing_to_make_good():
    weight = RNG.standard_normal((4, 16))
    nearest = quantize(jnp.asarray(weight, jnp.float32), "int4", scale_dtype=jnp.bfloat16)
    np.testing.assert_array_equal(gptq(weight, np.eye(16), nearest).values, nearest.values)


def test_columns_that_no_input_reaches_are_no_division_by_zero():
    weight = RNG.standard_normal((4, 16))
    nearest = quantize(jnp.asarray(weight, jnp.float32), "int4", scale_dtype=jnp.bfloat16)
    assert np.isfinite(np.asarray(dequantize(gptq(weight, np.zeros((16, 16)), nearest)))).all()


def test_a_training_part_without_cases_is_refused():
    class Empty(SyntheticCases):
        def __len__(self):
            return 0

    with pytest.raises(UserError, match="has no case in its training part"):
        calibration_batch(lambda raw: raw, Empty(0, 1, "train"), 8)
