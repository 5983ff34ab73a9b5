"""Products of few rows against float64, by modules' steps and by the kernel in JAX's own arithmetic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.ops import row_products, row_products_kernel
from r1jax.ops.quantize import Quantized, dequantize, quantize
from r1jax.ops.row_products import row_product, row_product_reference
from r1jax.ops.row_products_kernel import Tile, fits, rows_times_weight

RNG = np.random.default_rng(0)

INTERPRETED = functools.partial(rows_times_weight, tile=Tile(256, 1), interpret=True)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def exact(x, weight, gain=None, eps=0.0, added=None, paired=False):
    x = np.asarray(x, np.float64)[:, : weight.shape[1]]
    if gain is not None:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * np.asarray(gain, np.float64)
    y = x @ np.asarray(weight, np.float64).T
    if paired:
        gate, up = np.split(y, 2, axis=1)
        y = gate / (1 + np.exp(-gate)) * up
    return y if added is None else y + np.asarray(added, np.float64)


@pytest.mark.parametrize("codes", [False, True], ids=["floats", "codes"])
@pytest.mark.parametrize("product", [row_product_reference, INTERPRETED], ids=["reference", "kernel"])
@pytest.mark.parametrize(("count", "width"), [(1, 256), (3, 704)])  # whole tiles, and 64 numbers besides
def test_products_with_what_stands_before_and_after_them(product, codes, count, width):
    x, weight = normal(count, width + 9), normal(8, width) * 0.1  # the rows' last 9 numbers do not count
    held = quantize(weight, "int8", scale_dtype=jnp.bfloat16) if codes else weight
    plain = dequantize(held) if codes else weight
    gain, added = normal(width), normal(count, 8)
    ways = [{}, {"gain": gain, "eps": 0.3}, {"gain": gain, "eps": 0.3, "paired": True}, {"added": added}]
    for way in ways:
        found = product(x, held, **way)
        assert found.dtype == x.dtype
        np.testing.assert_allclose(found, exact(x, plain, **way), rtol=0, atol=2e-5, err_msg=str(list(way)))


def test_the_kernel_leaves_what_is_not_whole_tiles():
    x = normal(1, 256)
    assert fits(x, normal(32, 256)) and not fits(x, normal(28, 256)) and not fits(normal(1, 96), normal(32, 96))
    many = (jax.ShapeDtypeStruct((2**23, n), kind) for n, kind in ((256, jnp.int8), (1, jnp.bfloat16)))
    assert not fits(x, Quantized(*many))  # more numbers than 32 bits count
    assert not fits(x, normal(32, 256).astype(jnp.bfloat16))  # floats of another dtype
    assert not fits(x.astype(jnp.float16), normal(32, 256).astype(jnp.float16))  # whose halves of a word are other
    odd, pair = (normal(1, width).astype(jnp.bfloat16) for width in (257, 258))  # half a word at the end, and none
    assert fits(pair, normal(32, 256).astype(jnp.bfloat16)) and not fits(odd, normal(32, 256).astype(jnp.bfloat16))
    assert fits(x, quantize(normal(32, 256), "int8")) and not fits(x, quantize(normal(32, 256), "int8", block=128))
    assert not fits(x, quantize(normal(32, 256), "fp8"))


def test_a_program_takes_rows_that_fit_its_registers():
    rows_of = functools.partial(row_products_kernel.rows_of, tile=Tile(4096, 4))
    assert [rows_of(2048, 512, count) for count in (1, 2, 3, 8)] == [8, 4, 2, 1]
    assert rows_of(3648, 64, 1) == 64 and rows_of(24, 64, 1) == 8  # that divide all
    assert rows_of(2048, 8192, 1) == 1  # a row at least
    pieces = row_products_kernel.pieces_of(2736)
    assert pieces == [(0, 2048), (2048, 512), (2560, 128), (2688, 32), (2720, 16)]


def test_few_rows_in_bf16_take_the_kernel_where_it_agrees(monkeypatch):
    monkeypatch.setattr(row_products, "takes_triton", lambda: True)
    monkeypatch.setattr(row_products_kernel, "rows_times_weight", INTERPRETED)
    row_products._kernel_agrees.cache_clear()
    weight, asked = normal(8, 256).astype(jnp.bfloat16), []
    monkeypatch.setattr(row_products_kernel, "fits", lambda x, w: asked.append(len(x)) or True)
    for count in (1, row_products.MOST, row_products.MOST + 1):
        x = normal(count, 256).astype(jnp.bfloat16)
        np.testing.assert_allclose(
            np.asarray(jax.jit(row_product)(x, weight), np.float64), exact(x, weight), rtol=0.01, atol=0.1
        )
    row_products._kernel_agrees.cache_clear()
    assert asked == [1, row_products.MOST]
