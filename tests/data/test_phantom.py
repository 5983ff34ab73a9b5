"""The phantom: densities, geometry and purity of what is drawn."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.data.canvas import Canvas, _interpolation, point_spread, separable
from r1jax.data.phantom import Nodule, Scene, draw_scene, nodule_center_mm, render

SHAPE = (32, 32, 32)
CLEAN = Scene(
    spacing=(1.0, 1.0, 1.0),
    lung_hu=-860.0,
    emphysema=0.0,
    wall="none",
    trees=0,
    vessel_hu=40.0,
    blur_mm=0.45,
    noise_hu=5.0,
)
BALL = Nodule(
    place=(0.0, 0.0, 0.0),
    long_axis_mm=16.0,
    roundness=1.0,
    core=1.0,
    softness=0.0,
    lobulation=0.0,
    spikes=0,
    calcification=6,
)


def drawn(scene=CLEAN, nodule=BALL, seed=0, shape=SHAPE):
    """Volume (float) and mask."""
    volume, mask = render(scene, nodule, shape, np.random.default_rng(seed))
    return volume.astype(float), mask


def test_separable_applies_a_matrix_to_each_axis():
    rng = np.random.default_rng(0)
    volume = rng.standard_normal((4, 5, 6), dtype=np.float32)
    z, y, x = (rng.standard_normal(shape, dtype=np.float32) for shape in ((7, 4), (8, 5), (9, 6)))
    expected = np.einsum("abc,za,yb,xc->zyx", volume, z, y, x)
    np.testing.assert_allclose(separable(volume, (z, y, x)), expected, rtol=1e-4, atol=1e-4)


def test_point_spread_is_a_gaussian():
    rows = point_spread(31, 1.5)
    offset = np.arange(31) - 15
    np.testing.assert_allclose(rows.sum(axis=1), 1, rtol=1e-5)
    assert np.sqrt((rows[15] * offset**2).sum()) == pytest.approx(1.5, rel=0.01)


@pytest.mark.parametrize("sigma", [0.3, 0.5, 0.9])
def test_no_weight_is_so_small_that_it_is_slow_and_rows_still_add_up(sigma):
    for rows in (point_spread(32, sigma), _interpolation(32, 13)):
        assert rows.dtype == np.float32 and np.all((rows == 0) | (rows >= 1e-30)) and (rows == 0).any()
    np.testing.assert_allclose(point_spread(32, sigma).sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(_interpolation(32, 13), axis=1), 1, rtol=1e-6)


def covered(canvas, capsules):
    cover = np.zeros(canvas.shape, np.float32)
    canvas.capsules(cover, capsules)
    return cover


POINTS = st.tuples(*[st.floats(-25, 25)] * 3)
CAPSULES = st.lists(st.tuples(POINTS, POINTS, st.tuples(*[st.floats(0.15, 4)] * 2)), max_size=4)


@settings(max_examples=30, deadline=None)
@given(capsules=CAPSULES)
def test_capsules_cover_what_is_near_their_axis(capsules):
    canvas = Canvas((12, 14, 16), (1.5, 0.9, 0.9))
    z, y, x = np.meshgrid(*(axis.ravel().astype(float) for axis in canvas.axes), indexing="ij")
    place, expected = np.stack([z, y, x], axis=-1), np.zeros(canvas.shape)
    for start, stop, (first, last) in capsules:
        start, way = np.array(start), np.array(stop) - start
        share = np.clip((place - start) @ way / (way @ way + 1e-6), 0, 1)
        distance = np.linalg.norm(place - start - share[..., None] * way, axis=-1)
        inside = np.clip(0.5 + (first + share * (last - first) - distance) / canvas.edge, 0, 1)
        expected = np.maximum(expected, min(1, (first + last) / canvas.edge) * inside)
    # Near an axis the square of the distance is the small difference of numbers up to some thousands.
    np.testing.assert_allclose(covered(canvas, capsules), expected, atol=0.04)


@settings(max_examples=30, deadline=None)
@given(capsules=CAPSULES)
def test_capsules_drawn_together_are_those_drawn_one_by_one_bit_for_bit(capsules):
    canvas, alone, f32 = Canvas((12, 14, 16), (1.5, 0.9, 0.9)), np.zeros((12, 14, 16), np.float32), np.float32
    for start, stop, radii in capsules:
        reach = max(radii) + canvas.edge / 2
        low = [min(a, b) - reach for a, b in zip(start, stop, strict=True)]
        box = canvas.box(low, [max(a, b) + reach for a, b in zip(start, stop, strict=True)])
        if box is None:
            continue
        way = [b - a for a, b in zip(start, stop, strict=True)]
        square = (way[0] * way[0] + way[1] * way[1]) + way[2] * way[2] + 1e-6
        z, y, x = canvas.local(box, start)
        share = (z * f32(way[0] / square) + y * f32(way[1] / square)) + x * f32(way[2] / square)
        clipped = np.minimum(np.maximum(share, 0), 1)
        distance = ((z * z + y * y) + x * x) - f32(square) * share * share
        distance = np.sqrt(np.maximum(distance + (share - clipped) ** 2 * f32(square), 0))
        inside = distance * f32(-1 / canvas.edge) + clipped * f32((radii[1] - radii[0]) / canvas.edge)
        inside = np.clip(inside + f32(0.5 + radii[0] / canvas.edge), 0, 1)
        alone[box] = np.maximum(alone[box], inside * f32(min(1.0, (radii[0] + radii[1]) / canvas.edge)))
    np.testing.assert_array_equal(covered(canvas, capsules), alone)


def test_lung_alone_is_lung():
    volume, mask = drawn(nodule=None)
    assert not mask.any()
    assert -880 < np.median(volume) < -830
    assert (np.abs(volume + 855) < 200).mean() > 0.999


def test_emphysema_is_darker():
    sick = np.median([drawn(dataclasses.replace(CLEAN, emphysema=1.0), None, seed)[0].mean() for seed in range(5)])
    sound = np.median([drawn(nodule=None, seed=seed)[0].mean() for seed in range(5)])
    assert sick < sound - 30


@pytest.mark.parametrize(("core", "low", "high"), [(0.0, -660, -440), (1.0, -40, 90)])
def test_nodule_density_follows_texture(core, low, high):
    for seed in range(5):
        volume, mask = drawn(nodule=dataclasses.replace(BALL, core=core), seed=seed)
        assert low < np.median(volume[mask]) < high


def test_part_solid_has_both_densities():
    volume, mask = drawn(nodule=dataclasses.replace(BALL, core=0.52))
    inside = volume[mask]
    assert 0.05 < (inside > -150).mean() < 0.4
    assert (inside < -400).mean() > 0.4


def test_ball_has_the_volume_of_a_ball():
    _, mask = drawn()
    assert mask.sum() == pytest.approx(4 / 3 * np.pi * 8**3, rel=0.03)


@pytest.mark.parametrize("place", [(0.0, 0.0, 0.0), (0.9, -0.5, 0.2), (-0.7, 0.9, -0.9)])
def test_mask_lies_where_the_centre_says(place):
    scene = dataclasses.replace(CLEAN, spacing=(1.7, 0.9, 0.9))
    nodule = dataclasses.replace(BALL, place=place, long_axis_mm=9.0)
    _, mask = drawn(scene, nodule)
    mass = (np.argwhere(mask).mean(axis=0) - 15.5) * np.array(scene.spacing)
    np.testing.assert_allclose(mass, nodule_center_mm(scene, nodule, SHAPE), atol=0.4)


def test_long_axis_is_the_longest_extent():
    rng = np.random.default_rng(3)
    ratios = []
    for seed in range(40):
        spacing = (rng.uniform(1, 2), 1.0, 1.0)
        nodule = dataclasses.replace(
            BALL, long_axis_mm=rng.uniform(6, 22), roundness=rng.uniform(0.5, 1), lobulation=0.07
        )
        _, mask = drawn(dataclasses.replace(CLEAN, spacing=spacing), nodule, seed)
        points = np.argwhere(mask) * np.array(spacing)
        # A solid ellipsoid of semi-axis a has variance a^2 / 5 along it.
        ratios.append(2 * np.sqrt(5 * np.linalg.eigvalsh(np.cov(points.T))[-1]) / nodule.long_axis_mm)
    assert 0.97 < np.median(ratios) < 1.06
    assert min(ratios) > 0.85 and max(ratios) < 1.25


def test_roundness_is_the_axis_ratio():
    _, mask = drawn(nodule=dataclasses.replace(BALL, long_axis_mm=20.0, roundness=0.5))
    variances = np.linalg.eigvalsh(np.cov(np.argwhere(mask).T))
    assert np.sqrt(variances[0] / variances[-1]) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("pattern", [1, 2, 3, 4, 5])
def test_calcium_is_bright_and_only_in_calcified_nodules(pattern):
    for seed in range(5):
        volume, mask = drawn(nodule=dataclasses.replace(BALL, calcification=pattern), seed=seed)
        assert volume[mask].max() > 350
    volume, mask = drawn()
    assert volume[mask].max() < 150


def test_calcification_patterns_differ_in_place():
    def bright(pattern):
        volume, mask = drawn(nodule=dataclasses.replace(BALL, calcification=pattern))
        points = np.argwhere(volume > 300) - 15.5
        return points.mean(axis=0), (volume[mask] > 300).mean()

    assert np.linalg.norm(bright(5)[0]) < 0.7 < 2.5 < np.linalg.norm(bright(4)[0])
    assert bright(3)[1] > 0.7 > bright(2)[1] > bright(5)[1] > 0.05


def test_spikes_reach_beyond_the_body():
    def outside(spikes):
        volume, mask = drawn(nodule=dataclasses.replace(BALL, spikes=spikes))
        z, y, x = np.indices(SHAPE) - 15.5
        return (volume[(z * z + y * y + x * x > 9.5**2) & ~mask] > -600).sum()

    assert outside(0) == 0
    assert outside(14) > outside(4) > 3


def test_softness_widens_the_margin():
    def between(softness):
        volume, _ = drawn(nodule=dataclasses.replace(BALL, softness=softness))
        return ((volume > -700) & (volume < -100)).sum()

    assert between(0.3) > 1.5 * between(0.0)


def test_lobulation_roughens_the_surface():
    def unevenness(lobulation):
        _, mask = drawn(nodule=dataclasses.replace(BALL, lobulation=lobulation))
        points = np.argwhere(mask) - 15.5
        radius = np.linalg.norm(points, axis=1)
        surface = [radius[(points @ way) > 0.97 * radius].max() for way in np.eye(3).tolist() + (-np.eye(3)).tolist()]
        return np.std(surface)

    assert unevenness(0.15) > unevenness(0.0) + 0.3


def test_vessels_are_tubes_of_blood():
    volume, _ = drawn(dataclasses.replace(CLEAN, trees=6, vessel_hu=200.0), None)
    share = (volume > -300).mean()
    assert 0.002 < share < 0.3
    assert 120 < volume.max() < 230
    alone, _ = drawn(nodule=None)
    assert (alone > -300).sum() == 0


@pytest.mark.parametrize("wall", ["chest", "mediastinum"])
def test_wall_is_soft_tissue_and_leaves_the_nodule_in_the_lung(wall):
    scene = dataclasses.replace(CLEAN, wall=wall)
    bones = fats = 0
    for seed in range(12):
        nodule = dataclasses.replace(BALL, place=(0.0, 0.9, -0.9), long_axis_mm=8.0)
        volume, mask = drawn(scene, nodule, seed)
        assert mask.sum() > 0.8 * 4 / 3 * np.pi * 4**3
        tissue = volume[(volume > -20) & ~mask]
        if tissue.size > 500:
            assert 20 < np.median(tissue) < 400
        bones += (volume[~mask] > 250).sum() > 20
        fats += ((volume > -120) & (volume < -60)).sum() > 300
    assert (bones >= 4 and fats >= 3) if wall == "chest" else (bones == 0)


def test_noise_has_the_stated_size():
    quiet = drawn(dataclasses.replace(CLEAN, noise_hu=0.0), None)[0]
    loud = drawn(dataclasses.replace(CLEAN, noise_hu=30.0), None)[0]
    noise = (loud - quiet)[4:-4, 4:-4, 4:-4]
    assert noise.std() == pytest.approx(30, rel=0.06)
    # The point spread correlates neighbours.
    assert np.corrcoef(noise[:, :, 1:].ravel(), noise[:, :, :-1].ravel())[0, 1] > 0.1


def test_scenes_vary_as_stated():
    scenes = [draw_scene(np.random.default_rng(seed)) for seed in range(600)]
    walls = np.mean([scene.wall != "none" for scene in scenes])
    assert 0.27 < walls < 0.41
    assert all(0.8 <= s.spacing[1] <= 1.4 and 1.0 <= s.spacing[0] <= 2.0 and s.trees >= 3 for s in scenes)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    place=st.tuples(*[st.floats(-1, 1)] * 3),
    long_axis=st.floats(4, 24),
    core=st.sampled_from([0.0, 0.35, 0.7, 1.0]),
    spikes=st.integers(0, 16),
    pattern=st.integers(1, 6),
    shape=st.sampled_from([(32, 32, 32), (16, 24, 20), (40, 32, 32)]),
)
def test_any_parameters_give_finite_pure_pictures(seed, place, long_axis, core, spikes, pattern, shape):
    nodule = Nodule(place, long_axis, max(0.45, 2.6 / long_axis), core, 0.2, 0.1, spikes, pattern)
    scene = draw_scene(np.random.default_rng(seed))
    volume, mask = render(scene, nodule, shape, np.random.default_rng(seed))
    again, _ = render(scene, nodule, shape, np.random.default_rng(seed))
    assert volume.dtype == np.int16 and mask.dtype == bool and volume.shape == mask.shape == shape
    assert volume.min() >= -1024 and volume.max() <= 2000
    assert mask.any()
    np.testing.assert_array_equal(volume, again)
    center = nodule_center_mm(scene, nodule, shape)
    assert all(abs(c) <= n * s / 4 + 1e-9 for c, n, s in zip(center, shape, scene.spacing, strict=True))
