"""The kernels that round rows for Hopper, in Pallas' interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("this JAX has no interpreter for Mosaic GPU kernels", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu

from r1jax.ops import row_codes_hopper as kernels
from r1jax.ops.quantize import BOUND, quantize

RNG = np.random.default_rng(0)
STAGES = [0, 2]
"""A thread block for each row, and two that take rows in turn, from a ring that is used anew."""


def normal(*shape):
    return jax.block_until_ready(jnp.asarray(RNG.standard_normal(shape).astype(jnp.bfloat16)))


@pytest.fixture
def interpreter(monkeypatch):
    """Results are waited for: its threads wait for each other in programs, among which no others may stand."""
    monkeypatch.setattr(kernels, "multiprocessors", lambda: 2)
    monkeypatch.setattr(kernels, "SHARED", 1)
    with plgpu.force_gpu_interpret_mode():
        yield


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rows_become_the_nearest_numbers(interpreter, kind):
    sizes = np.asarray([[1], [0], [2**-20], [2**20], [1], [3], [1]], jnp.bfloat16)
    x = jax.block_until_ready(normal(7, 1024) * sizes)
    values, scale = jax.block_until_ready(kernels.row_codes(x, kind))
    known = quantize(x, kind)
    np.testing.assert_array_equal(scale, known.scale[:, 0])
    if kind == "fp8":
        np.testing.assert_array_equal(values, known.values)
    else:  # of two that are as near, the interpreter's division may take the other one
        wide = np.asarray(x, np.float64) / np.asarray(scale, np.float64)[:, None]
        assert np.abs(np.asarray(values, np.float64) - wide).max() <= 0.5 + 1e-5


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_factors_become_what_their_product_would(interpreter, kind, stages):
    """The product in float64, rounded to bf16; gates reach from where the sigmoid is 0 to where it is 1."""
    gate, up = normal(7, 1024) * np.asarray(20, jnp.bfloat16), normal(7, 1024)
    gate = jax.block_until_ready(gate.at[0, :4].set(jnp.asarray([-1e4, -100, 100, 1e4], jnp.bfloat16)).at[1].set(0))
    values, scale = jax.block_until_ready(kernels.gated_codes(gate, up, kind, stages=stages))
    wide = np.asarray(gate, np.float64)
    exact = wide * np.exp(-np.logaddexp(0, -wide)) * np.asarray(up, np.float64)
    hidden = exact.astype(jnp.bfloat16)
    largest = np.abs(hidden.astype(np.float64)).max(axis=1)
    np.testing.assert_allclose(scale, np.maximum(largest / BOUND[kind], 2.0**-100), rtol=1e-6)
    known = quantize(jnp.asarray(hidden), kind)
    apart = np.asarray(values, np.float32) != np.asarray(known.values, np.float32)
    assert apart.mean() < 2e-3  # fp32 lies on the other side of a halfway point now and then
    scale = np.asarray(scale, np.float64)[:, None]
    half = scale / 2 if kind == "int8" else np.maximum(np.abs(exact) / 16, scale / 1024)  # of a step
    assert (np.abs(np.asarray(values, np.float64) * scale - exact) <= half + np.abs(exact) / 256).all()


@pytest.mark.parametrize("stages", STAGES)
def test_a_row_that_is_not_finite_has_no_finite_scale(interpreter, stages):
    gate, up = normal(5, 1024).at[1, 3].set(jnp.nan), normal(5, 1024).at[3, 1000].set(jnp.inf)
    _, scale = jax.block_until_ready(kernels.gated_codes(*jax.block_until_ready((gate, up)), "int8", stages=stages))
    np.testing.assert_array_equal(np.isfinite(scale), [True, False, True, False, True])


def test_rows_that_fit():
    assert kernels.fits_row(1024) and kernels.fits_row(8192) and kernels.fits_row(16384)
    assert not kernels.fits_row(512) and not kernels.fits_row(1536) and not kernels.fits_row(17408)


def test_no_more_thread_blocks_than_a_multiprocessor_holds():
    """Of 65,536 registers and 227 KiB; an 8,192 wide row of SwiGLU takes 153 registers of a thread."""
    assert kernels._resident(8192, [2, 2], 2) == 3 == 65536 // (128 * 160)
    assert kernels._resident(8192, [2, 2], 3) == 2 and kernels._resident(16384, [2, 2], 2) == 1
    assert kernels._resident(2048, [2], 3) == 10
