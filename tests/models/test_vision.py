"""Image and volume encoders: convolutions and blocks against lax and loops, patch merging as a permutation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import VisionConfig
from r1jax.models.vision import PlaneConv, ResidualBlock, ThroughConv, VisionEncoder, space_to_depth

SIZES = {2: (32, 16), 3: (8, 16, 8)}
VOLUMES = pytest.mark.once
"""JAX 0.11 compiles an encoder of volumes for 12 seconds; .ci/run trains one with it as well."""


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


def plane64(x, weight):
    """In-plane convolution in fp64."""
    *_, height, width, _ = x.shape
    padded = np.pad(np.asarray(x, np.float64), (*[(0, 0)] * (x.ndim - 3), (1, 1), (1, 1), (0, 0)))
    taps = np.asarray(weight, np.float64)
    return sum(padded[..., i : i + height, j : j + width, :] @ taps[i, j] for i, j in np.ndindex(3, 3))


def test_plane_convolution_is_that_of_each_slice():
    x, weight = draw(2, 3, 5, 6, 4), draw(3, 3, 4, 7, seed=1)
    y = np.asarray(PlaneConv(7, jnp.float32).apply({"params": {"weight": weight}}, x))
    assert y.shape == (2, 3, 5, 6, 7)
    np.testing.assert_allclose(y, plane64(x, weight), rtol=0, atol=2e-5)


def test_through_convolution_is_a_3x1x1_kernel():
    x, weight = draw(2, 5, 3, 4, 6), draw(7, 3 * 6, seed=1)
    y = ThroughConv(7, jnp.float32).apply({"params": {"Linear_0": {"weight": weight}}}, x)
    kernel = weight.reshape(7, 3, 6).transpose(1, 2, 0)[:, None, None]
    dims = ("NDHWC", "DHWIO", "NDHWC")
    expected = jax.lax.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", dimension_numbers=dims)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5)


def residual_block(rank, norm):
    """A block of random weights, and a batch of unlike pictures."""
    module, x = ResidualBlock(jnp.float32, norm), draw(2, 4, 5, 6, 8) if rank == 3 else draw(2, 5, 6, 8)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    params = jax.tree.unflatten(tree, [draw(*leaf.shape, seed=i) / 4 for i, leaf in enumerate(leaves, start=1)])
    return (
        lambda x: module.apply({"params": params}, x),
        params,
        x * jnp.asarray([1.0, 2.0]).reshape(2, *[1] * (rank + 1)),
    )


@pytest.mark.parametrize("norm", ["cell", "picture"])
@pytest.mark.parametrize("rank", [2, 3])
def test_a_block_is_its_formula(rank, norm):
    def normed(x, weight):
        axes = -1 if norm == "cell" else tuple(range(1, x.ndim))
        x = x / np.sqrt(np.mean(x**2, axis=axes, keepdims=True) + 1e-6) * weight
        return x / (1 + np.exp(-x))

    apply, params, x = residual_block(rank, norm)
    p, x64 = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params), np.asarray(x, np.float64)
    y = normed(plane64(normed(x64, p["first_norm"]["weight"]), p["first"]["weight"]), p["second_norm"]["weight"])
    if rank == 2:
        y = plane64(y, p["second"]["weight"])
    else:
        padded = np.pad(y, ((0, 0), (1, 1), *[(0, 0)] * 3))
        taps = np.split(p["second"]["Linear_0"]["weight"].T, 3)
        y = sum(padded[:, i : i + y.shape[1]] @ tap for i, tap in enumerate(taps))
    np.testing.assert_allclose(np.asarray(apply(x)), x64 + y, rtol=0, atol=2e-5)


@pytest.mark.parametrize("rank", [2, 3])
def test_how_bright_a_place_is_beside_others_is_seen_with_the_norm_of_the_picture(rank):
    there = (0, *[2] * rank)
    for norm in ("cell", "picture"):
        apply, _, x = residual_block(rank, norm)
        brighter = x.at[there].multiply(10.0)
        moved = np.abs(np.asarray((apply(brighter) - brighter) - (apply(x) - x)))
        assert moved[1].max() == 0  # cases do not mix
        assert (moved[0].max() > 0.1) == (norm == "picture")
        scaled = np.asarray(apply(x * 10.0) - x * 10.0)  # how bright the whole is, neither sees
        np.testing.assert_allclose(scaled, np.asarray(apply(x) - x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("norm", ["cell", "picture"])
@pytest.mark.parametrize("rank", [2, 3])
def test_gradients_of_a_block_are_finite_where_a_picture_is_black(rank, norm):
    apply, _, x = residual_block(rank, norm)
    gradients = jax.grad(lambda x: jnp.sum(apply(x) ** 2))(x.at[0].set(0.0))
    assert np.isfinite(np.asarray(gradients)).all() and np.abs(np.asarray(gradients[1])).max() > 0


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


@pytest.mark.parametrize(
    ("rank", "merge", "norm"),
    [
        (2, 1, "cell"),
        (2, 1, "picture"),
        pytest.param(3, 2, "cell", marks=VOLUMES),
        pytest.param(3, 2, "picture", marks=VOLUMES),
    ],
)
def test_tokens_of_images_and_volumes(rank, merge, norm):
    apply, x, spacing = encoder(rank, merge=merge, norm=norm)
    out = apply(x, spacing)
    grid = tuple(n // 4 for n in SIZES[rank])
    assert out.tokens.shape == (2, int(np.prod(grid)) // merge**rank, 10)
    assert out.summary.shape == (2, 10) and out.where.shape == (2, *grid)
    other = apply(x.at[1].add(1.0), spacing.at[1].multiply(2.0))  # cases do not mix
    assert change(out, other)[0].max() == 0 and change(out, other)[1].max() > 1e-3
    for again in (apply(x, spacing * 2), apply(jnp.flip(x, -1), spacing)):  # the size of a voxel and the side are read
        assert change(out, again).max(axis=1).min() > 1e-3


@pytest.mark.parametrize("rank", [2, pytest.param(3, marks=VOLUMES)])
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
