"""The kernels of int8 and fp8 products in Pallas' interpreter, and where they are taken."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("this JAX has no interpreter for Mosaic GPU kernels", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu

from r1jax.models.layers import MLP
from r1jax.models.lora import Lora
from r1jax.models.quantized import rounding_by
from r1jax.ops import quantized_dot as ways
from r1jax.ops import quantized_dot_hopper as kernels
from r1jax.ops import row_codes_hopper as rounding
from r1jax.ops.quantize import dequantize, quantize
from r1jax.ops.quantized_dot import Gated, Scheme, multiply, quantized_dot

RNG = np.random.default_rng(0)
SMALL = kernels.Tiling(columns=128, stages=2, band=2)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape).astype(jnp.bfloat16))


@pytest.fixture
def interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "multiprocessors", lambda: 4)
    monkeypatch.setattr(rounding, "multiprocessors", lambda: 2)
    monkeypatch.setattr(rounding, "SHARED", 1)
    monkeypatch.setattr(kernels, "scaled_product", functools.partial(kernels.scaled_product, tiling=SMALL))
    with plgpu.force_gpu_interpret_mode():
        yield


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(ways, "target", lambda: SimpleNamespace(platform="gpu", compute_capability="9.0"))
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(kernels, "multiprocessors", lambda: 132)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_every_tile_is_summed_and_scaled(interpreter, kind):
    """In two turns of a cluster, one block of which has nothing to do, by tiles that overhang and a ring used anew."""
    x, w = quantize(normal(320, 384), kind), quantize(normal(192, 384), kind, scale_dtype=jnp.bfloat16)
    found = kernels.scaled_product(x.values, w.values, x.scale[:, 0], w.scale[:, 0], jnp.bfloat16)
    exact = np.asarray(dequantize(x), np.float64) @ np.asarray(dequantize(w), np.float64).T
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-5 * np.abs(exact).max())
    if kind == "int8":  # whose sums are exact in any order
        np.testing.assert_array_equal(found, multiply(x, w).astype(jnp.bfloat16))


def test_a_row_that_is_not_finite_has_no_finite_product(interpreter):
    """As where there is no kernel; a row of zeros, or one too small for a scale, gives zeros, all others numbers."""
    x = normal(64, 1024).at[3, 5].set(jnp.nan).at[4, 7].set(jnp.inf).at[5].set(0).at[6].set(1e-39)
    w = quantize(normal(64, 1024), "int8", scale_dtype=jnp.bfloat16)
    for way in (ways._by_kernel, ways._by_compiler):
        found = np.asarray(ways._product(way, Scheme("int8", "int8"), x, None, w, None), np.float32)
        np.testing.assert_array_equal(np.isfinite(found).all(axis=1), ~np.isin(np.arange(64), [3, 4]))
        assert not np.isfinite(found[3:5]).any() and not found[5:7].any()


@pytest.mark.parametrize("form", ["plain", "balance", "span", "gated"])
def test_both_ways_give_the_same_numbers_and_gradients(interpreter, form):
    x = RNG.integers(-126, 127, (2, 32, 1024))
    x[..., 0] = 127  # so that no number lies halfway between two codes
    x, codes = jnp.asarray(x, jnp.bfloat16), quantize(normal(64, 1024), "int8", scale_dtype=jnp.bfloat16)
    if form == "balance":
        codes = codes._replace(balance=jnp.tile(jnp.asarray([[1, 2, 0.5, 1]], jnp.bfloat16), (1, 256)))
    if form == "span":
        codes = codes._replace(span=jnp.full((1, 1), 1.5))
    if form == "gated":  # by gates for which silu is the identity
        x = Gated(jnp.full_like(x, 64), x)

    def product(way):
        """Waits: the interpreter's threads wait for each other in programs, among which no others may stand."""
        run = functools.partial(ways._product, way, Scheme("int8", "int8"))
        out, back = jax.vjp(lambda x: run(x, None, codes, None), jax.block_until_ready(x))
        return jax.block_until_ready(out), back

    (found, back), (known, known_back) = product(ways._by_kernel), product(ways._by_compiler)
    np.testing.assert_array_equal(found, known)
    pulled = (jax.tree.leaves(pull(jnp.cos(known))) for pull in (back, known_back))
    for one, other in zip(*pulled, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_product_of_many_weights_at_once_is_left_to_the_compiler():
    """As of the fields of a table; the kernel itself cannot run here."""
    x, w = normal(3, 8, 1024), quantize(normal(3, 64, 1024), "int8", scale_dtype=jnp.bfloat16)
    for inputs in (x, Gated(x, normal(8, 1024))):
        axes = (0, 0) if inputs is x else (Gated(0, None), 0)
        found = jax.vmap(lambda x, w: ways._by_kernel(x, "int8", w)[1], axes)(inputs, w)
        known = jax.vmap(lambda x, w: ways._by_compiler(x, "int8", w)[1], axes)(inputs, w)
        np.testing.assert_array_equal(found, known)


def taken(rows=4096, columns=2048, depth=1024, *, dtype=jnp.bfloat16, kind="int8", block=None):
    found = []

    def look(x, w):
        found.append(ways._on_hopper(x, quantize(w, kind, block=block)))

    shapes = ((2, rows // 2, depth), dtype), ((columns, depth), jnp.float32)
    jax.eval_shape(look, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    return found[0]


def test_the_kernel_is_taken_on_hopper_by_products_that_fit(hopper):
    assert taken() and taken(kind="fp8") and taken(columns=8192 + 64)
    assert not taken(dtype=jnp.float32) and not taken(block=256) and not taken(kind="affine8")
    assert not taken(rows=4096 + 2) and not taken(columns=2048 + 8) and not taken(depth=1024 + 64)
    assert not taken(rows=1024)  # 64 tiles for 132 multiprocessors
    assert taken(rows=256, columns=2**16) and not taken(rows=128, columns=2**16)  # half a cluster would be idle
    assert not taken(depth=2**18)  # more products than an int32 holds: refused where XLA multiplies


@pytest.mark.parametrize("lack", ["capability", "older", "newer", "devices"])
def test_the_kernel_is_not_taken_elsewhere(hopper, monkeypatch, lack):
    if lack == "capability":
        monkeypatch.setattr(ways, "target", lambda: SimpleNamespace(platform="gpu", compute_capability="8.0"))
    elif lack == "devices":
        monkeypatch.setattr(jax, "device_count", lambda: 2)
    else:
        monkeypatch.setattr(jax, "__version_info__", (0, 10, 2) if lack == "older" else (0, 12, 0))
    assert not taken()


@pytest.mark.parametrize("right", [True, False])
def test_what_is_multiplied_on_hopper_is_tried_first(hopper, monkeypatch, right):
    """A program is made of the kernel if it agrees with its reference here, and of XLA's product otherwise."""
    monkeypatch.setattr(ways, "_hopper_agrees", lambda kind, gated=False: right)
    text = str(
        jax.make_jaxpr(lambda x, w: quantized_dot(x, w, Scheme("int8", "int8")))(normal(4096, 1024), normal(2048, 1024))
    )
    assert ("mpmd_map" in text or "pallas_call" in text) == right
    assert ("dot_general" in text) != right


@pytest.mark.parametrize("form", ["factors", "failed", "lora", "running", "length"])
def test_swiglu_gives_down_proj_its_factors_where_a_kernel_takes_them(hopper, monkeypatch, form):
    seen = []

    def kernel(x, kind, codes):
        seen.append(type(x) is Gated)
        return ways._by_compiler(x, kind, codes)

    monkeypatch.setattr(ways, "_by_kernel", kernel)
    monkeypatch.setattr(ways, "_hopper_agrees", lambda kind, gated=False: not gated or form != "failed")
    width = 2048 + 128 if form == "length" else 2048
    mlp = MLP(width, jnp.bfloat16, lora=Lora(4) if form == "lora" else Lora())
    with rounding_by((".=int8:int8/running" if form == "running" else "int8",)):
        jax.eval_shape(mlp.init, jax.random.key(0), jax.ShapeDtypeStruct((4, 1024, 2048), jnp.bfloat16))
    assert seen == [False, False, form == "factors"]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("off", [1.0, 1.1])
def test_the_trial_tells_right_from_wrong(monkeypatch, off, gated):
    def kernel(x, kind, codes):
        x = x.product() if gated else x
        narrow = ways.input_codes(x, kind, codes)
        return narrow, (dequantize(narrow) @ dequantize(codes).T * off).astype(x.dtype)

    monkeypatch.setattr(ways, "_by_kernel", kernel)
    monkeypatch.setattr(ways, "TRIED", (8, 16))
    if off == 1:
        assert ways._hopper_agrees.__wrapped__("int8", gated)
    else:
        with pytest.warns(UserWarning, match="the kernel of int8 products .*is not used"):
            assert not ways._hopper_agrees.__wrapped__("int8", gated)
