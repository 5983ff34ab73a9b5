"""Products with weights of codes against float64, in either of their forms, and what is not read."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.ops import weight_only, weight_only_kernel
from r1jax.ops.quantize import dequantize, quantize
from r1jax.ops.weight_only import grouped_weight_only_dot, weight_only_dot
from r1jax.ops.weight_only_kernel import Tile, fits, row_times_codes

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


@pytest.fixture(params=["library", "summed"])
def form(request, monkeypatch):
    """Both ways of multiplying: a GPU takes the second one for few rows."""
    if request.param == "summed":
        monkeypatch.setattr(weight_only, "target", lambda: SimpleNamespace(platform="gpu"))


@pytest.mark.parametrize(("kind", "block"), [("int8", None), ("int4", 5), ("fp8", None), ("affine8", None)])
def test_products_are_of_what_codes_stand_for(form, kind, block):
    codes = quantize(normal(6, 13), kind, block=block, scale_dtype=jnp.bfloat16)
    exact = np.asarray(dequantize(codes), np.float64)
    for shape in ((13,), (1, 2, 13), (5, 13)):
        x = normal(*shape)
        found = weight_only_dot(x, codes)
        assert found.dtype == x.dtype
        np.testing.assert_allclose(found, np.asarray(x, np.float64) @ exact.T, rtol=0, atol=2e-5)


def test_balanced_columns_are_divided_out(form):
    codes = quantize(normal(6, 13), "int8", scale_dtype=jnp.bfloat16)
    balanced = codes._replace(balance=2.0 ** jnp.arange(-6, 7).astype(jnp.bfloat16)[None])
    x = normal(3, 13)
    exact = np.asarray(x, np.float64) @ (np.asarray(dequantize(codes), np.float64) / 2.0 ** np.arange(-6, 7)).T
    np.testing.assert_allclose(weight_only_dot(x, balanced), exact, rtol=1e-5, atol=2e-4)
    tile = Tile(2, 13, 1)
    assert fits(codes, tile) and not fits(balanced, tile)


def test_a_scale_a_row_costs_bf16_no_digit(form):
    """Codes are exact in bf16 and the scale joins the sum, so that only activations and the result are rounded."""
    codes = quantize(normal(6, 64), "int8", scale_dtype=jnp.bfloat16)
    x = normal(2, 64).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(dequantize(codes), np.float64).T
    found = weight_only_dot(x, codes)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(("kind", "block"), [("int8", None), ("int4", 5)])
@pytest.mark.parametrize("rows", [1, 3])
def test_each_block_meets_its_expert_and_others_are_not_read(form, kind, block, rows):
    weight, own = normal(4, 6, 13), jnp.asarray([0, 2, 2, 4])  # expert 4 of 4 stands for a block of zeros
    codes = quantize(weight, kind, block=block, scale_dtype=jnp.bfloat16)
    exact = np.asarray(dequantize(codes), np.float64)
    codes = codes._replace(scale=codes.scale.at[1].set(jnp.nan))
    x = normal(4, rows, 13).at[3].set(0)
    found = grouped_weight_only_dot(x.reshape(-1, 13), codes, own).reshape(4, rows, 6)
    want = np.stack([np.asarray(x[i], np.float64) @ exact[min(int(e), 3)].T for i, e in enumerate(own)])
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-5)


def test_gradient_by_rows_needs_no_float_copy_of_the_weight():
    codes = quantize(normal(6, 13), "int8", scale_dtype=jnp.bfloat16)
    x, pull = normal(3, 13), normal(3, 6)
    found = jax.vjp(lambda x: weight_only_dot(x, codes), x)[1](pull)[0]
    exact = np.asarray(pull, np.float64) @ np.asarray(dequantize(codes), np.float64)
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("tile", [Tile(2, 8, 1), Tile(4, 16, 2)])
def test_the_kernel_sums_every_tile_of_each_row(tile):
    codes = quantize(normal(8, 32), "int8", scale_dtype=jnp.bfloat16)
    assert fits(codes, tile)
    x = normal(32)
    found = row_times_codes(x, codes, tile=tile, interpret=True)
    exact = np.asarray(dequantize(codes), np.float64) @ np.asarray(x, np.float64)
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-5)


def test_the_kernel_leaves_what_is_not_whole_tiles_with_a_scale_a_row():
    tile = Tile(4, 16, 2)
    for shape, kind, block in (((6, 32), "int8", None), ((8, 24), "int8", None), ((8, 32), "int4", 16)):
        assert not fits(quantize(normal(*shape), kind, block=block), tile)
    assert not fits(quantize(normal(8, 32), "affine8"), tile)


def test_the_kernel_is_tried_while_a_program_is_traced(monkeypatch):
    interpreted = functools.partial(weight_only_kernel.row_times_codes, interpret=True)
    monkeypatch.setattr(weight_only_kernel, "row_times_codes", interpreted)
    found = []
    jax.make_jaxpr(lambda x: found.append(weight_only._kernel_agrees.__wrapped__()) or x)(1.0)
    assert found == [True]
