"""The kernels for Hopper in Pallas' interpreter, which also checks the phases of their barriers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("this JAX has no interpreter for Mosaic GPU kernels", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu

from r1jax.ops import grouped_matmul_hopper as kernels

EXPERTS = np.array([0, 0, 2, 3])
"""Two blocks, none, one, and one behind the last group."""
WIDTH, OUT = 128, 192


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((512, n)).astype(jnp.bfloat16) for n in (WIDTH, OUT))
    x[384:], y[384:] = 0, 0
    w = rng.standard_normal((3, OUT, WIDTH)).astype(jnp.bfloat16)
    return [jnp.asarray(a) for a in (x, y, w)]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "multiprocessors", lambda: 3)  # of six tiles, each does two
    with plgpu.force_gpu_interpret_mode():
        yield


def close(found, expected):
    found = np.asarray(found, np.float32)
    assert np.abs(found - expected).max() <= 2**-8 * np.abs(expected).max()


def blocks(x):
    return np.asarray(x, np.float32).reshape(4, 128, -1)


@pytest.mark.parametrize("split_rows", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_blocks_times_the_weights_of_their_experts(arrays, transposed, split_rows):
    x, y, w = arrays
    rows = x if transposed else y
    tiling = kernels.Tiling(columns=128, stages=2, band=2, split_rows=split_rows)  # the last column's tiles overhang
    found = kernels.blocks_times_weights(rows, w, jnp.asarray(EXPERTS, jnp.int32), transposed=transposed, tiling=tiling)
    matrices = np.asarray(w, np.float32)
    matrices = np.swapaxes(matrices, 1, 2) if transposed else matrices
    close(found, np.concatenate([b @ matrices[min(e, 2)] for b, e in zip(blocks(rows), EXPERTS, strict=True)]))


def test_blocks_times_blocks_sum_over_each_expert(arrays):
    x, y, _ = arrays
    tiling = kernels.Tiling(columns=128, stages=2, band=2)
    found = kernels.blocks_times_blocks(y, x, jnp.asarray([0, 2, 2, 3], jnp.int32), block=128, tiling=tiling)
    a, b = blocks(y), blocks(x)
    expected = [a[0].T @ b[0] + a[1].T @ b[1], np.zeros((OUT, WIDTH)), a[2].T @ b[2]]
    close(found, np.stack(expected))
