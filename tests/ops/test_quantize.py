"""Rounding to narrow numbers against float64, Qwix and arithmetic on paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.ops.quantize import (
    BOUND,
    block_of,
    dequantize,
    pack_int4,
    quantize,
    quantize_reference,
    unpack_int4,
)

RNG = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(("shape", "block"), [((5, 16), None), ((2, 3, 10), 4), ((7, 9), 2), ((4, 6), 64)])
def test_codes_and_scales_are_those_of_float64(kind, shape, block):
    x = normal(*shape)
    q = quantize(x, kind, block=block)
    values, scale = quantize_reference(np.asarray(x), kind, block=block)
    np.testing.assert_array_equal(q.values, values)
    np.testing.assert_allclose(q.scale, scale, rtol=3e-7)
    assert q.values.dtype == jnp.int8 and np.abs(q.values).max() == BOUND[kind]
    step = np.repeat(np.asarray(q.scale), block_of(q) or shape[-1], axis=-1)[..., : shape[-1]]
    assert (np.abs(dequantize(q) - x) <= step / 2 * (1 + 1e-5)).all()


def test_a_scale_that_is_rounded_down_clips_and_never_wraps_around():
    x = jnp.array([[127.48, -127.48, 50.5]])  # in bf16 their scale is 1, and the floor of the second is -128
    for bits, last in ((0, 50), (2**32 - 1, 51)):
        q = quantize(x, "int8", scale_dtype=jnp.bfloat16, bits=jnp.full(x.shape, bits, jnp.uint32))
        np.testing.assert_array_equal(q.scale, [[1.0]])
        np.testing.assert_array_equal(q.values, [[127, -127, last]])


def test_zeros_have_a_scale_and_stay_zeros():
    for kind in ("int8", "int4", "fp8", "affine8"):
        q = quantize(jnp.zeros((2, 4)), kind)
        assert (np.asarray(q.scale) > 0).all() and not np.asarray(dequantize(q)).any()


def test_rounding_twice_changes_nothing():
    x = normal(64, 48)
    for kind in ("int8", "int4"):
        once = quantize(x, kind, block=16, scale_dtype=jnp.bfloat16)
        twice = quantize(dequantize(once), kind, block=16, scale_dtype=jnp.bfloat16)
        np.testing.assert_array_equal(once.values, twice.values)
        np.testing.assert_array_equal(once.scale, twice.scale)


def test_fp8_has_four_significant_bits():
    x = normal(8, 32)
    q = quantize(x, "fp8")
    assert q.values.dtype == jnp.float8_e4m3fn
    exact = np.abs(q.values.astype(np.float32)) >= 2**-6  # below, e4m3 has fewer bits
    error = np.abs(dequantize(q) - x)[exact]
    assert (error <= np.abs(x)[exact] * 2**-4 * (1 + 1e-5)).all()


def test_the_affine_formula_uses_all_codes_of_a_range_to_one_side():
    x = jnp.linspace(3.0, 5.0, 256)[None]
    q = quantize(x, "affine8")
    np.testing.assert_array_equal(q.values[0], np.arange(256))
    assert np.abs(dequantize(q) - x).max() < np.abs(dequantize(quantize(x, "int8")) - x).max()


def test_stochastic_rounding_is_right_on_average():
    x = jnp.full((1, 20000), 0.3).at[0, 0].set(127.0)  # so that the scale is 1
    bits = jnp.asarray(RNG.integers(0, 2**32, x.shape, dtype=np.uint32))
    q = np.asarray(quantize(x, "int8", bits=bits).values)[0, 1:]
    assert set(q) == {0, 1} and abs(q.mean() - 0.3) < 4 * np.sqrt(0.21 / len(q))


@pytest.mark.parametrize("shape", [(3, 5), (2, 2, 4), (1,)])
def test_packing_int4_takes_half_a_byte_a_number_and_is_undone(shape):
    values = RNG.integers(-8, 8, shape).astype(np.int8)
    packed = pack_int4(values)
    assert packed.nbytes == -(-values.size // 2)
    np.testing.assert_array_equal(unpack_int4(packed, shape), values)


def test_codes_are_qwixs_where_the_grids_are_the_same():
    qwix = pytest.importorskip("qwix", reason="Qwix, the reference of another project, is not installed")
    x = normal(96, 128)
    # Its bound is 127.5 and ours 127.
    theirs = qwix.quantize(x, jnp.int8, channelwise_axes=(0,), calibration_method="absmax,1.003937007874016")
    ours = jax.jit(lambda x: quantize(x, "int8"))(x)
    np.testing.assert_array_equal(ours.values, theirs.qvalue)
    np.testing.assert_allclose(ours.scale, theirs.scale, rtol=1e-6)


def test_a_span_is_the_scale_of_all_rows_and_clips_what_is_beyond_it():
    x = normal(6, 12)
    for kind, block in (("int8", None), ("int8", 4), ("int4", 5)):
        q = quantize(x, kind, block=block, span=jnp.full((1, 1), 1.5))
        step = 1.5 / BOUND[kind]
        np.testing.assert_allclose(q.scale, np.full(q.scale.shape, step), rtol=3e-7)
        exact = np.clip(np.round(np.asarray(x, np.float64) / step), -BOUND[kind], BOUND[kind])
        np.testing.assert_array_equal(q.values, exact)
        assert np.abs(exact).max() == BOUND[kind]  # some are beyond it


def test_balanced_codes_stand_for_the_weight_that_was_balanced():
    w, power = normal(5, 8), jnp.asarray(2.0 ** RNG.integers(-3, 4, (1, 8)), jnp.float32)
    q = quantize(w * jnp.broadcast_to(power, w.shape), "int8")
    stands = dequantize(q._replace(balance=power.astype(jnp.bfloat16)))
    np.testing.assert_array_equal(stands * jnp.broadcast_to(power, w.shape), dequantize(q))


def test_a_scale_is_rounded_to_bf16_by_what_no_compiler_leaves_out():
    """XLA may leave out a cast to bf16 and back, and then rounds by another scale than the one that is stored."""
    rounded = jax.jit(lambda x: quantize(x, "int8", scale_dtype=jnp.bfloat16)).lower(jnp.ones((2, 3))).as_text()
    assert "reduce_precision" in rounded and "format = e8m7" in rounded
