"""Rounding by what it does to outputs."""

import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.data.synthetic import SyntheticCases
from r1jax.errors import UserError
from r1jax.ops.quantize import dequantize, quantize
from r1jax.ops.quantized_dot import Scheme, quantized_dot
from r1jax.serve.quantize_weights import Seen, best_codes, calibration_batch, gptq, output_error
from r1jax.train.quantized import encode

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


def outliers() -> tuple[np.ndarray, Seen]:
    """A weight whose inputs are small but for one in twelve."""
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((300, 24)) * np.where(np.arange(24) % 12 == 5, 40, 1)).astype(np.float32)
    return rng.standard_normal((16, 24)), Seen(x.T @ x, np.abs(x).max(axis=0), x)


def change(weight, seen, codes, scheme) -> float:
    """Squared change of the outputs that codes make, relative to the outputs."""
    exact = seen.rows.astype(np.float64) @ weight.T
    return float(
        np.sum((np.asarray(quantized_dot(jnp.asarray(seen.rows), codes, scheme)) - exact) ** 2 / np.sum(exact**2))
    )


@pytest.mark.parametrize("scheme", [Scheme("int8", "int8"), Scheme("int4", block=12)], ids=str)
def test_a_balance_makes_good_what_outliers_of_inputs_cost(scheme):
    weight, seen = outliers()
    nearest, best = encode(jnp.asarray(weight, jnp.float32), scheme), best_codes(weight, seen, scheme)
    assert best.balance is not None and best.span is None
    exponent = np.log2(np.asarray(best.balance, np.float64))
    np.testing.assert_array_equal(exponent, np.round(exponent))
    assert exponent[0, [5, 17]].min() > np.delete(exponent[0], [5, 17]).max()  # where the large inputs are
    assert change(weight, seen, best, scheme) < 0.3 * change(weight, seen, nearest, scheme)


def test_even_inputs_need_no_balance_and_none_is_taken_where_it_is_not_wanted():
    weight, seen = outliers()
    assert best_codes(weight, seen, Scheme("int8", "int8"), balance=False)[3:] == (None, None)
    rng = np.random.default_rng(2)
    x, even = rng.choice([-1.0, 1.0], (64, 24)).astype(np.float32), rng.choice([-1.0, 1.0], (16, 24))
    assert best_codes(even, Seen(x.T @ x, np.ones(24), x), Scheme("int8", "int8")).balance is None


def test_one_range_of_all_inputs_is_that_of_the_least_error():
    weight, seen = outliers()
    scheme = Scheme("int8", "int8")
    codes = best_codes(weight, seen, scheme, static=True)
    largest = (seen.largest / np.asarray(codes.balance[0], np.float32)).max()
    assert 0.5 * largest <= float(codes.span[0, 0]) <= largest
    error = change(weight, seen, codes, scheme)
    for share in (0.5, 1.0):
        assert error <= change(weight, seen, codes._replace(span=jnp.full((1, 1), share * largest)), scheme) * (
            1 + 1e-5
        )
    assert change(weight, seen, best_codes(weight, seen, scheme), scheme) < error < 1e-2  # rows of their own are better


def test_inputs_that_no_calibration_case_has_get_no_range():
    weight, nothing = RNG.standard_normal((4, 8)), Seen(np.zeros((8, 8)), np.zeros(8), np.zeros((2, 8), np.float32))
    codes = best_codes(weight, nothing, Scheme("int8", "int8"), static=True)
    assert codes.span is None and codes.balance is None


def test_a_training_part_without_cases_is_refused():
    class Empty(SyntheticCases):
        def __len__(self):
            return 0

    with pytest.raises(UserError, match="has no case in its training part"):
        calibration_batch(lambda raw: raw, Empty(0, 1, "train"), 8)
