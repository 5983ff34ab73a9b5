"""Products of quantized numbers against float64, and what the compiled program multiplies."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.ops import quantized_dot as ways
from r1jax.ops.grouped_quantized_dot import grouped_quantized_dot
from r1jax.ops.quantize import Quantized, dequantize, quantize, quantize_reference
from r1jax.ops.quantized_dot import (
    Gated,
    Scheme,
    multiply,
    quantized_dot,
    quantized_dot_reference,
    ranged_dot,
    rounded,
    weight_codes,
)

RNG = np.random.default_rng(0)
INT8 = Scheme("int8", "int8")
SCHEMES = [
    INT8,
    Scheme("int8", "int8", block=8),
    Scheme("int4", "int8", block=7),
    Scheme("fp8", "fp8"),
    Scheme("int8"),
    Scheme("int4", block=8),
    Scheme("affine8"),
]


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def dots(f, *arrays) -> list[str]:
    """Types of the results of all products of the traced program."""
    return re.findall(r":(\w+)\[[\d,]*\] = dot_general\[", str(jax.make_jaxpr(f)(*arrays)))


@pytest.mark.parametrize(("kind", "block"), [("int8", None), ("int8", 8), ("int4", 7), ("int4", 5)])
def test_the_product_is_that_of_float64(kind, block):
    x, w = normal(6, 20), normal(9, 20)
    a, b = quantize(x, "int8", block=block), quantize(w, kind, block=block)
    exact = quantized_dot_reference(
        quantize_reference(np.asarray(x), "int8", block=block), quantize_reference(np.asarray(w), kind, block=block)
    )
    np.testing.assert_allclose(multiply(a, b), exact, rtol=0, atol=3e-6 * np.abs(exact).max())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_product_is_near_that_of_floats_and_that_of_what_codes_stand_for(scheme):
    x, w = normal(4, 3, 32), normal(8, 32)
    y, exact = quantized_dot(x, w, scheme), jnp.einsum("...I,OI->...O", x, w)
    width = {"int8": 0.02, "int4": 0.2, "fp8": 0.06, "affine8": 0.02}[scheme.weights]
    assert jnp.linalg.norm(y - exact) < width * jnp.linalg.norm(exact)
    if scheme.activations:
        x = dequantize(quantize(x, scheme.activations, block=scheme.block and -(-32 // -(-32 // scheme.block))))
    same = jnp.einsum("...I,OI->...O", x, rounded(w, scheme, jnp.float32))
    np.testing.assert_allclose(y, same, rtol=0, atol=2e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_stored_codes_serve_bit_for_bit_what_was_trained(scheme):
    x, w = normal(5, 24), normal(24, 24)
    codes = jax.jit(lambda w: weight_codes(w, scheme))(w)
    trained = jax.jit(lambda x, w: quantized_dot(x, w, scheme))(x, w)
    served = jax.jit(lambda x, codes: quantized_dot(x, codes, scheme))(x, codes)
    np.testing.assert_array_equal(trained, served)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gradients_go_straight_through_the_rounding(scheme):
    x, w, g = normal(5, 24), normal(8, 24), normal(5, 8)
    to_x, to_w = jax.jit(jax.grad(lambda x, w: jnp.sum(quantized_dot(x, w, scheme) * g), argnums=(0, 1)))(x, w)
    codes = weight_codes(w, scheme)
    seen = x
    if scheme.activations:
        block = None if codes.scale.shape[-1] == 1 else -(-24 // codes.scale.shape[-1])
        seen = dequantize(quantize(x, scheme.activations, block=block))
    np.testing.assert_allclose(to_x, g @ dequantize(codes), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(to_w, g.T @ seen, rtol=1e-5, atol=1e-5)
    alone = jax.jit(jax.grad(lambda x: jnp.sum(quantized_dot(x, codes, scheme) * g)))(x)
    np.testing.assert_allclose(alone, to_x, rtol=1e-5, atol=1e-5)


def test_narrow_gradients_are_int8_products_and_right_on_average():
    scheme = Scheme("int8", "int8", gradients="int8")
    x, w, g = normal(16, 24), normal(8, 24), normal(16, 8)

    def gradients(key):
        return jax.grad(lambda x, w: jnp.sum(quantized_dot(x, w, scheme, key=key) * g), argnums=(0, 1))(x, w)

    assert dots(gradients, jax.random.key(0)) == ["i32"] * 3
    drawn = jax.jit(jax.vmap(gradients))(jax.random.split(jax.random.key(1), 400))
    exact = jax.jit(jax.grad(lambda x, w: jnp.sum(quantized_dot(x, w, INT8) * g), argnums=(0, 1)))(x, w)
    for many, one in zip(drawn, exact, strict=True):
        error = np.asarray(jnp.mean(many, axis=0) - one) / np.asarray(jnp.std(many, axis=0) / np.sqrt(400) + 1e-6)
        assert 0.7 < np.sqrt(np.mean(error**2)) < 1.3  # as it is for the mean of 400 unbiased draws


def test_sums_that_no_int32_holds():
    x, w, scheme = jnp.ones((140_000, 1)), jnp.ones((1, 1)), Scheme("int8", "int8", gradients="int8")
    slope = jax.grad(lambda w: jnp.sum(quantized_dot(x, w, scheme, key=jax.random.key(0))))
    np.testing.assert_allclose(jax.jit(slope)(w), [[140_000]], rtol=1e-5)
    long = quantize(jnp.ones((1, 140_000)), "int8")
    with pytest.raises(ValueError, match="140000 products overflow"):
        multiply(long, long)
    short = quantize(jnp.ones((1, 140_000)), "int8", block=70_000)
    np.testing.assert_allclose(multiply(short, short), [[140_000]], rtol=1e-5)


@pytest.mark.parametrize("rows", [24, 8, 5])
def test_a_batch_as_long_as_a_width_changes_nothing(rows):
    x, w = normal(24, 24), normal(24, 24)
    whole = quantized_dot(x, w, INT8)
    np.testing.assert_array_equal(quantized_dot(x[:rows], w, INT8), whole[:rows])


def test_the_compiled_program_multiplies_int8_and_sums_int32():
    x, w, groups = normal(8, 16), normal(16, 16), jnp.zeros(2, jnp.int32)
    dense = functools.partial(quantized_dot, scheme=INT8)
    grouped = functools.partial(grouped_quantized_dot, scheme=INT8)
    assert dots(dense, x, w) == dots(grouped, x, w[None], groups) == ["i32"]
    text = jax.jit(dense).lower(x, w).as_text()
    assert re.search(r"dot_general.*\(tensor<8x16xi8>, tensor<16x16xi8>\) -> tensor<8x16xi32>", text)
    compiled = jax.jit(dense).lower(x, w).compile().as_text()
    assert re.search(r"s32\[8,16\]\S* (dot|fusion|custom-call)\(", compiled) and "s8[" in compiled


def test_the_value_is_qwixs_where_the_grids_are_the_same():
    qwix = pytest.importorskip("qwix", reason="Qwix, the reference of another project, is not installed")
    x, w = normal(16, 64), normal(32, 64)
    method = "absmax,1.003937007874016"  # its bound is 127.5 and ours 127
    a, b = (qwix.quantize(v, jnp.int8, channelwise_axes=(0,), calibration_method=method) for v in (x, w))
    with jax.numpy_dtype_promotion("standard"):  # it relies on it
        theirs = qwix.dot_general(a, b, (((1,), (1,)), ((), ())))
    ours = multiply(quantize(x, "int8"), quantize(w, "int8"))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * float(np.abs(theirs).max()))


def test_codes_with_an_offset_are_multiplied_as_floats():
    assert isinstance(weight_codes(normal(4, 8), Scheme("affine8")), Quantized)
    assert dots(functools.partial(quantized_dot, scheme=Scheme("affine8")), normal(3, 8), normal(4, 8)) == ["f32"]


@pytest.mark.parametrize("scheme", [INT8, Scheme("int4", "int8", block=7), Scheme("int8", "int8", "int8")], ids=str)
def test_balance_and_span_of_a_weight_reach_its_inputs(scheme):
    x, w, power = normal(2, 3, 20), normal(9, 20), 2.0 ** RNG.integers(-3, 4, (1, 20))
    codes = weight_codes(w * jnp.asarray(np.broadcast_to(power, w.shape), jnp.float32), scheme)
    codes = codes._replace(balance=jnp.asarray(power, jnp.bfloat16), span=jnp.full((1, 1), 4.0))
    step = 4.0 / 127
    rows = np.clip(np.round(np.asarray(x, np.float64).reshape(6, 20) / power / step), -127, 127)
    scale = np.full((6, codes.scale.shape[-1]), step)
    exact = quantized_dot_reference((rows, scale), (np.asarray(codes.values), np.asarray(codes.scale, np.float64)))
    key = jax.random.key(0)
    y, pull = jax.vjp(lambda x: quantized_dot(x, codes, scheme, key=key), x)
    np.testing.assert_allclose(y.reshape(6, 9), exact, rtol=0, atol=3e-6 * np.abs(exact).max())
    slope = pull(jnp.ones_like(y))[0]
    stands = np.asarray(dequantize(codes), np.float64).sum(axis=0)
    np.testing.assert_allclose(slope, np.broadcast_to(stands, slope.shape), rtol=0, atol=1e-5 * np.abs(stands).max())


RUNNING = [Scheme("int8", "int8", running=True), Scheme("int4", "int8", block=7), Scheme("fp8", "fp8")]


@pytest.mark.parametrize("scheme", RUNNING, ids=str)
def test_inputs_in_one_range_are_clipped_and_gradients_stop_beyond_it(scheme):
    x, w, g, span = normal(5, 24), normal(8, 24), normal(5, 8), 1.25

    @jax.jit
    def slopes(x, w, span):
        return jax.grad(lambda *a: jnp.sum(ranged_dot(a[0], a[1], scheme, a[2]) * g), argnums=(0, 1, 2))(x, w, span)

    y, (to_x, to_w, seen) = jax.jit(lambda *a: ranged_dot(*a[:2], scheme, a[2]))(x, w, span), slopes(x, w, span)
    if scheme.activations == "int8":
        scale = np.float64(np.float32(span) * np.float32(1 / 127))
        held = np.clip(np.round(np.asarray(x, np.float64) / scale), -127, 127) * scale
    else:
        held = np.asarray(jnp.clip(x / (span / 448), -448, 448).astype(jnp.float8_e4m3fn), np.float64) * span / 448
    weight = np.asarray(dequantize(weight_codes(w, scheme)), np.float64)
    np.testing.assert_allclose(y, held @ weight.T, rtol=0, atol=2e-5)
    inside = np.abs(x) <= span
    assert 0.5 < inside.mean() < 0.95
    np.testing.assert_allclose(to_x, np.where(inside, np.asarray(g, np.float64) @ weight, 0), rtol=0, atol=2e-5)
    np.testing.assert_allclose(to_w, np.asarray(g, np.float64).T @ held, rtol=0, atol=2e-5)
    assert seen == np.abs(x).max()


@pytest.mark.parametrize("scheme", RUNNING, ids=str)
def test_a_frozen_range_trains_what_stored_codes_serve_bit_for_bit(scheme):
    x, w, span = normal(5, 24), normal(8, 24), jnp.float32(1.7)
    codes = jax.jit(lambda w: weight_codes(w, scheme))(w)._replace(span=jnp.full((1, 1), span))
    trained = jax.jit(lambda x, w, span: ranged_dot(x, w, scheme, span))(x, w, span)
    served = jax.jit(lambda x, codes: quantized_dot(x, codes, scheme))(x, codes)
    np.testing.assert_array_equal(trained, served)


@pytest.mark.parametrize("scheme", RUNNING, ids=str)
def test_without_a_range_yet_each_row_has_its_own(scheme):
    x, w, g = normal(5, 24), normal(8, 24), normal(5, 8)
    new, old = (
        jax.jit(jax.value_and_grad(lambda x, w, dot=dot: jnp.sum(dot(x, w) * g), argnums=(0, 1)))(x, w)
        for dot in (
            lambda x, w: ranged_dot(x, w, scheme, jnp.float32(0)),
            lambda x, w: quantized_dot(x, w, scheme),
        )
    )
    jax.tree.map(np.testing.assert_array_equal, new, old)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_reaches_the_gradient_though_it_is_clipped(bad):
    x, w = jnp.asarray(np.where(np.arange(4096).reshape(64, 64) == 66, bad, 0.5), jnp.float32), normal(4, 64)
    to_x = jax.jit(jax.grad(lambda x: jnp.sum(ranged_dot(x, w, RUNNING[0], jnp.float32(1)))))(x)
    assert np.isnan(to_x[1, 2])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_has_no_finite_product(bad):
    """And no other row changes; XLA's maximum of so many numbers on a CPU passes over NaN."""
    x, w = normal(64, 64), normal(4, 64)
    dot = jax.jit(lambda x: quantized_dot(x, w, Scheme("int8", "int8")))
    found = dot(x.at[3, 5].set(bad))
    assert not np.isfinite(found[3]).any()
    np.testing.assert_array_equal(*(np.delete(y, 3, axis=0) for y in (found, dot(x))))


@pytest.mark.parametrize("scheme", [INT8, Scheme("int8", "int8", "int8"), Scheme("fp8", "fp8")], ids=str)
def test_factors_give_the_values_and_gradients_of_their_product(scheme):
    gate, up, w, key = normal(2, 3, 24), normal(2, 3, 24), normal(8, 24), jax.random.key(0)
    codes = weight_codes(w, scheme)

    def from_factors(gate, up, w):
        return ways._product(ways._by_compiler, scheme, Gated(gate, up), w, codes, key)

    def from_product(gate, up, w):
        x = gate * jax.nn.sigmoid(gate) * up
        return quantized_dot(x, w, scheme, key=key, gated=Gated(gate, up))

    (found, back), (known, known_back) = (jax.vjp(f, gate, up, w) for f in (from_factors, from_product))
    np.testing.assert_array_equal(found, known)
    for one, other in zip(back(jnp.cos(known)), known_back(jnp.cos(known)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_rows_on_several_devices_have_one_largest_input():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w = normal(16, 24), normal(8, 24)
    rows, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
    largest = jax.jit(
        jax.grad(lambda span, x: jnp.sum(ranged_dot(x, w, RUNNING[0], span))),
        in_shardings=(whole, rows),
        out_shardings=whole,
    )(jnp.float32(1), x)
    assert largest == np.abs(x).max()
