"""Image and volume encoders: convolutions against lax and loops, patch merging as a permutation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import VisionConfig
from r1jax.models.vision import PlaneConv, ThroughConv, VisionEncoder, space_to_depth

SIZES = {2: (32, 16), 3: (8, 16, 8)}


@pytest.mark.parametrize(("shape", "stride"), [((2, 4, 6, 3), 2), ((2, 4, 6, 8, 1), 2), ((1, 8, 4, 1), 4)])
def test_space_to_depth_moves_each_cell_into_channels(shape, stride):
    x = np.arange(np.prod(shape)).reshape(shape).astype(np.float32)
    y = np.asarray(space_to_depth(jnp.asarray(x), stride))
    rank = len(shape) - 2
    assert y.shape == (shape[0], *[n // stride for n in shape[1:-1]], stride**rank * shape[-1])
    np.testing.assert_array_equal(np.sort(y.ravel()), x.ravel())  # a permutation
    restored = np.zeros_like(x)
    for cell in np.ndindex(*y.shape[1:-1]):
        block = tuple(slice(i * stride, (i + 1) * stride) for i in cell)
        restored[(slice(None), *block)] = y[(slice(None), *cell)].reshape(shape[0], *[stride] * rank, shape[-1])
    np.testing.assert_array_equal(restored, x)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_plane_convolution_is_that_of_each_slice():
    x, weight = draw(2, 3, 5, 6, 4), draw(3, 3, 4, 7, seed=1)
    y = np.asarray(PlaneConv(7, jnp.float32).apply({"params": {"weight": weight}}, x))
    assert y.shape == (2, 3, 5, 6, 7)
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.zeros(y.shape)
    for i, j in np.ndindex(3, 3):
        expected += padded[:, :, i : i + 5, j : j + 6] @ np.asarray(weight[i, j], np.float64)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5)


def test_through_convolution_is_a_3x1x1_kernel():
    x, weight = draw(2, 5, 3, 4, 6), draw(7, 3 * 6, seed=1)
    y = ThroughConv(7, jnp.float32).apply({"params": {"Linear_0": {"weight": weight}}}, x)
    kernel = weight.reshape(7, 3, 6).transpose(1, 2, 0)[:, None, None]
    dims = ("NDHWC", "DHWIO", "NDHWC")
    expected = jax.lax.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", dimension_numbers=dims)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5)


def encoder(rank, **changes):
    config = VisionConfig(size=SIZES[rank], widths=(8, 12), blocks=(1, 1), num_attention_heads=2, **changes)
    module, rng = VisionEncoder(config, 10), np.random.default_rng(0)
    x, spacing = draw(2, *config.size), jnp.asarray([[0.7] * rank, [2.0] * rank])
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, spacing))["params"]
    params = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape) / s.shape[-1] ** 0.5, jnp.float32), shapes)
    return jax.jit(lambda x, spacing: module.apply({"params": params}, x, spacing)), x, spacing


def change(a, b):
    """Largest difference of each token of each case."""
    return np.abs(np.asarray(a.tokens - b.tokens)).max(axis=2)


@pytest.mark.parametrize(("rank", "merge"), [(2, 1), (3, 2)])
def test_tokens_of_images_and_volumes(rank, merge):
    apply, x, spacing = encoder(rank, merge=merge)
    out = apply(x, spacing)
    grid = tuple(n // 4 for n in SIZES[rank])
    assert out.tokens.shape == (2, int(np.prod(grid)) // merge**rank, 10)
    assert out.summary.shape == (2, 10) and out.where.shape == (2, *grid)
    other = apply(x.at[1].add(1.0), spacing.at[1].multiply(2.0))  # cases do not mix
    assert change(out, other)[0].max() == 0 and change(out, other)[1].max() > 1e-3
    for again in (apply(x, spacing * 2), apply(jnp.flip(x, -1), spacing)):  # the size of a voxel and the side are read
        assert change(out, again).max(axis=1).min() > 1e-3


@pytest.mark.parametrize("rank", [2, 3])
def test_transformer_layers_see_everything_convolutions_their_surroundings(rank):
    far = (slice(None), *[-1] * rank)
    apply, x, spacing = encoder(rank, layers=0)
    moved = change(apply(x.at[far].add(5.0), spacing), apply(x, spacing))
    assert moved[:, -1].min() > 1e-3 and moved[:, 0].max() == 0
    apply, x, spacing = encoder(rank, layers=1)
    assert change(apply(x.at[far].add(5.0), spacing), apply(x, spacing))[:, 0].min() > 1e-5


def test_on_a_gpu_the_summary_of_places_is_held_apart_from_being_joined():
    apply, x, spacing = encoder(2)
    program = apply.trace(x, spacing).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("optimization_barrier") == 1
