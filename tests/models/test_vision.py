"""Image and volume encoders: convolutions against lax and loops, patch merging as a permutation, symmetry by views."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from r1jax.config import DecoderConfig, ModelConfig, VisionConfig
from r1jax.models.r1 import R1, Inputs
from r1jax.models.symmetric import SymmetricBlock, eight_kernels
from r1jax.models.vision import PlaneConv, ResidualBlock, ThroughConv, VisionEncoder, space_to_depth
from r1jax.tasks.medical.batch import orient, swap_in_plane, view_of

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


def symmetric(**changes):
    config = VisionConfig(size=(24, 24), widths=(16, 32, 48), blocks=(1, 1, 1), num_attention_heads=2, symmetric=True)
    return dataclasses.replace(config, **changes)


def random_weights(model, *arguments, **settings):
    """Parameters of every place at random, so that nothing is symmetric by its initial value."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *arguments, **settings))["params"]
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape) / s.size**0.5 * 3, jnp.float32), shapes)


@pytest.mark.parametrize(
    "changes", [{"stem_stride": 1}, {"stem_stride": 2, "merge": 3}, {"stem_stride": 3, "widths": (8, 16, 24)}]
)
def test_a_symmetric_encoder_gives_the_same_logit_of_all_eight_views(changes):
    config = ModelConfig(
        modalities=("image",),
        decoder=DecoderConfig(hidden_size=32, num_hidden_layers=1, first_k_dense_replace=1, num_attention_heads=2),
        image=symmetric(**changes),
    )
    model = R1(config, (("nodule_present", 1),))
    x, spacing = draw(4, 24, 24), jnp.asarray([[0.7, 0.7], [0.5, 0.9], [2.0, 1.0], [1.0, 1.0]])

    def inputs(view):
        flips, swap = view_of(view, 4, 2)
        turned = orient(x, flips, swap), swap_in_plane(spacing, swap)
        return Inputs(image=turned[0], image_spacing=turned[1], has_image=jnp.ones(4, bool))

    params = random_weights(model, inputs(0))
    logit = jax.jit(lambda inputs: model.apply({"params": params}, inputs).heads["nodule_present"])
    found = np.stack([logit(inputs(view)) for view in range(8)])
    assert found[0].std() > 1e-2  # cases differ
    np.testing.assert_allclose(found, np.broadcast_to(found[:1], found.shape), rtol=0, atol=1e-5)


def test_cells_of_a_symmetric_encoder_move_with_the_image():
    config = symmetric()
    module, x, spacing = VisionEncoder(config, 10), draw(2, 24, 24), jnp.ones((2, 2))
    params = random_weights(module, x, spacing)
    apply = jax.jit(lambda x: module.apply({"params": params}, x, spacing))
    for view in range(8):
        flips, swap = view_of(view, 2, 2)
        a, b = apply(x), apply(orient(x, flips, swap))
        np.testing.assert_allclose(orient(a.where, flips, swap), b.where, rtol=0, atol=1e-5)
    assert np.asarray(a.where).std() > 1e-2 and change(a, apply(x + 0.1 * draw(2, 24, 24, seed=3))).min() > 1e-3


@pytest.mark.parametrize("incoming", [1, 8])
def test_kernels_in_eight_orientations_are_turned_in_plane_and_exchange_their_inputs(incoming):
    """Against the group by itself: orientations as matrices, whose products say which one an input becomes."""
    base = np.random.default_rng(0).standard_normal((3, 3, incoming, 2, 5)).astype(np.float32)
    swap, mirrors = np.array([[0, 1], [1, 0]]), {0: np.diag([1, 1]), 1: np.diag([1, -1]), 2: np.diag([-1, 1])}
    group = [mirrors[g // 4 * 2] @ mirrors[g // 2 % 2] @ np.linalg.matrix_power(swap, g % 2) for g in range(8)]
    number = {m.tobytes(): i for i, m in enumerate(group)}
    assert len(number) == 8
    found = np.asarray(eight_kernels(jnp.asarray(base))).reshape(3, 3, incoming, 2, 8, 5)
    for g, turn in enumerate(group):
        for place in np.ndindex(3, 3):
            source = tuple(turn.T @ (np.array(place) - 1) + 1)
            for h in range(incoming):
                back = number[(turn.T @ group[h]).tobytes()] if incoming == 8 else 0
                np.testing.assert_array_equal(found[(*place, h, slice(None), g)], base[(*source, back)])


def test_a_symmetric_encoder_has_an_eighth_of_the_weights():
    def weights(config):
        shapes = jax.eval_shape(
            lambda: VisionEncoder(config, 10).init(jax.random.key(0), draw(1, 24, 24), jnp.ones((1, 2)))
        )
        return {"/".join(k): np.prod(v.shape) for k, v in flatten_dict(shapes["params"]).items() if "block" in str(k)}

    shared, plain = weights(symmetric()), weights(symmetric(symmetric=False))
    assert {name.removeprefix("stages/"): 8 * size for name, size in shared.items()} == plain


@pytest.mark.parametrize(("kind", "rank"), [(ResidualBlock, 2), (ResidualBlock, 3), (SymmetricBlock, 2)])
def test_blocks_are_skipped_case_by_case_and_only_in_training(kind, rank):
    x, module = draw(16, *(4,) * rank, 8), kind(jnp.float32, skipped=0.25)
    params = module.init(jax.random.key(0), x, None)
    whole = module.apply(params, x, None) - x
    for key in range(2):
        rngs = {"dropout": jax.random.key(key)}
        part = module.apply(params, x, jnp.arange(16), rngs=rngs) - x
        again = module.apply(params, x[8:], jnp.arange(8, 16), rngs=rngs) - x[8:]
        np.testing.assert_allclose(part[8:], again, rtol=0, atol=1e-5)  # a case's fate is its own
        left = np.asarray(jnp.abs(part).reshape(16, -1).max(axis=1)) > 0
        assert 0 < left.sum() < 16
        np.testing.assert_allclose(
            part, jnp.where(left.reshape(16, *[1] * (rank + 1)), whole / 0.75, 0), rtol=0, atol=1e-5
        )
