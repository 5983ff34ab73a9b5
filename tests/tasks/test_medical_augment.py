"""Windowing, cropping and augmentation: targets move with the picture; hiding never leaves a case empty."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import Config, ModelConfig, TaskConfig, VisionConfig
from r1jax.tasks.medical import batch as b
from r1jax.tasks.medical.schema import RECORD_FIELDS
from r1jax.tasks.medical.task import Medical


def test_window_at_landmarks():
    hounsfield = jnp.asarray([-3000, -1000, -300, 400, 3000], jnp.int16)
    np.testing.assert_allclose(b.window(hounsfield), [-1, -1, 0, 1, 1], atol=1e-6)
    np.testing.assert_allclose(b.window(jnp.asarray([0, 255], jnp.uint8)), [-1, 1], atol=1e-6)
    # Bytes hold the same window: both ways agree within half a byte.
    every = np.arange(-1000, 401, 7)
    stored = np.round((every + 1000) / 1400 * 255).astype(np.uint8)
    ways = b.window(jnp.asarray(every, jnp.int16)), b.window(jnp.asarray(stored))
    np.testing.assert_allclose(*ways, rtol=0, atol=1 / 255 + 1e-6)


def test_fit_crops_about_the_centre_and_pads_with_air():
    x = jnp.arange(2 * 5 * 6, dtype=jnp.float32).reshape(2, 5, 6)
    np.testing.assert_array_equal(b.fit(x, (3, 2)), x[:, 1:4, 2:4])
    np.testing.assert_array_equal(b.fit(x, (5, 6)), x)
    padded = np.asarray(b.fit(x, (8, 4)))
    assert padded.shape == (2, 8, 4)
    np.testing.assert_array_equal(padded[:, 1:6], x[:, :, 1:5])
    assert (padded[:, [0, 6, 7]] == -1).all()
    np.testing.assert_array_equal(b.fit(b.fit(x, (9, 10)), (5, 6)), x)  # cropping undoes padding


@pytest.mark.parametrize("have", [9, 10, 11, 12, 13, 14, 15])
def test_the_middle_after_fitting_is_where_it_was(have):
    """A single bright voxel tells where the given middle went."""
    for want in (12, 13):
        place = have // 2
        x = np.asarray(b.fit(jnp.full((1, have), 0.5).at[0, place].set(2.0), (want,)))
        before, after = place - (have - 1) / 2, int(x[0].argmax()) - (want - 1) / 2
        assert b.fitted_middle((have,), (want,)) == (after - before,)


def position(x):
    """Centre of mass of what is brighter than air, as an offset from the centre in voxels; [B, rank]."""
    x = np.maximum(np.asarray(x, np.float64) - 0.05, 0)
    axes = [np.arange(n) - (n - 1) / 2 for n in x.shape[1:]]
    grids = np.meshgrid(*axes, indexing="ij")
    return np.stack([(x * g).sum(tuple(range(1, x.ndim))) / x.sum(tuple(range(1, x.ndim))) for g in grids], -1)


def bright(offsets, size, width=1.0):
    """Blobs on a background of 0; offsets from the centre in voxels."""
    grids = np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in size], indexing="ij")
    squared = sum((g[None] - o.reshape(-1, *[1] * len(size))) ** 2 for g, o in zip(grids, offsets.T, strict=True))
    return jnp.asarray(np.exp(-squared / (2 * width**2)), jnp.float32)


@pytest.mark.parametrize("index", range(8))
@pytest.mark.parametrize("rank", [2, 3])
def test_orientations_move_pictures_and_vectors_alike(index, rank):
    flips, transpose = b.view_of(index, 2, rank)
    vector = np.array([[1.5, 2.5, -0.5], [-2.5, 0.5, 1.5]], np.float32)[:, -rank:]
    x = bright(vector, (8,) * rank, 0.4)
    turned = b.orient_vector(jnp.asarray(vector), flips, transpose)
    np.testing.assert_allclose(position(b.orient(x, flips, transpose)), turned, rtol=0, atol=0.2)
    np.testing.assert_array_equal(b.unorient_vector(turned, flips, transpose), vector)
    assert np.array_equal(turned, vector) == (index == 0)


@pytest.mark.parametrize("index", range(1, 8))
def test_views_are_eight_different_orientations(index):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 4, 4)), jnp.float32)
    views = [np.asarray(b.orient(x, *b.view_of(i, 1, 3))) for i in range(8)]
    assert not any(np.array_equal(views[index], views[other]) for other in range(index))


CASES = 24
augment = jax.jit(b.augment, static_argnames="mode")


@pytest.mark.parametrize("mode", ["flips", "affine"])
@pytest.mark.parametrize(
    ("size", "spacing"),
    [((16, 24, 24), (2.5, 0.7, 0.7)), ((16, 24, 24), (1.0, 0.6, 0.9)), ((12, 20, 28), (2.0, 1.1, 0.8))],
    ids=["thick slices", "voxels not square", "picture not square"],
)
def test_centre_moves_with_the_nodule(mode, size, spacing):
    rng = np.random.default_rng(0)
    offsets = rng.uniform(-0.2, 0.2, (CASES, 3)) * np.array(size)
    spacings = np.tile(np.float32(spacing), (CASES, 1))
    targets = {
        "center_mm": jnp.asarray(offsets * spacings, jnp.float32),
        "nodule_present": jnp.ones(CASES),
    }
    x = bright(offsets, size)
    x, new_spacing, moved, _ = augment(
        jax.random.split(jax.random.key(0), CASES), x, jnp.asarray(spacings), targets, mode=mode
    )
    # Contrast scales by at least e^-0.15 and lifts by up to 0.15: the background is taken off again.
    flat = np.asarray(x).reshape(CASES, -1)
    found = position((np.asarray(x) - np.median(flat, axis=1).reshape(-1, 1, 1, 1)) * 2)
    error = found * np.asarray(new_spacing) - np.asarray(moved["center_mm"])
    assert np.abs(error / np.asarray(new_spacing)).max() < (0.1 if mode == "flips" else 0.35)
    assert np.abs(np.asarray(moved["center_mm"]) - offsets * spacings).max() > 1  # it did move
    assert moved["nodule_present"] is not None and x.shape == (CASES, *size)
    swapped = (0, 2, 1) if size[1] == size[2] else (0, 1, 2)
    possible = {tuple(np.float32(spacing)), tuple(np.float32(spacing)[list(swapped)])}
    assert set(map(tuple, np.asarray(new_spacing))) == possible


def test_length_grows_with_the_picture_and_an_unknown_centre_stays_unknown():
    x = bright(np.zeros((CASES, 3)), (24, 24, 24), 2.5)
    targets = {"long_axis_mm": jnp.full(CASES, 10.0), "center_mm": jnp.zeros((CASES, 3)).at[3, 1].set(jnp.nan)}
    y, _, moved, zoom = augment(
        jax.random.split(jax.random.key(1), CASES), x, jnp.ones((CASES, 3)), targets, mode="affine"
    )
    ratio = np.asarray(moved["long_axis_mm"]) / 10
    np.testing.assert_allclose([spread(case) / spread(np.asarray(x[0])) for case in np.asarray(y)], ratio, rtol=0.05)
    assert ratio.min() < 0.9 and ratio.max() > 1.1
    np.testing.assert_allclose(zoom, ratio, rtol=1e-6)
    unknown = np.isnan(np.asarray(moved["center_mm"]))
    assert unknown[3].any() and not np.delete(unknown, 3, axis=0).any()


def spread(picture):
    """Root mean square distance of a blob's voxels from their middle, in voxels."""
    weight = picture - np.median(picture)
    weight = np.where(weight > 0.1 * weight.max(), weight, 0)
    places = np.stack(np.meshgrid(*[np.arange(n) for n in picture.shape], indexing="ij"), -1).reshape(-1, picture.ndim)
    middle = np.average(places, axis=0, weights=weight.ravel())
    return np.sqrt(np.average(((places - middle) ** 2).sum(-1), weights=weight.ravel()))


BOTH = Config(
    model=ModelConfig(
        modalities=("volume", "image"), volume=VisionConfig(size=(24, 24, 24)), image=VisionConfig(size=(24, 24))
    ),
    task=TaskConfig(fields=("long_axis_mm", "center_mm"), modality_dropout=0.0, augment="affine"),
)


def both_pictures(offsets, size):
    """A collated batch in which a volume and a slice show the same blobs."""
    count = len(offsets)
    return {
        "volume": jnp.asarray(bright(offsets, size, 2.5) * 1000 - 300, jnp.int16),
        "volume_spacing": jnp.full((count, 3), 0.8),
        "has_volume": jnp.ones(count, bool),
        "image": jnp.asarray(bright(offsets[:, 1:], size[1:], 2.5) * 1000 - 300, jnp.int16),
        "image_spacing": jnp.full((count, 2), 0.8),
        "has_image": jnp.ones(count, bool),
        "target.long_axis_mm": jnp.full(count, 10.0),
        "target.center_mm": jnp.asarray(offsets * 0.8, jnp.float32),
    }


def test_both_pictures_of_a_case_grow_alike():
    batch = both_pictures(np.zeros((CASES, 3)), (24, 24, 24))
    before, _ = jax.jit(Medical(BOTH).prepare)(batch)
    after, targets = jax.jit(Medical(BOTH).prepare)(batch, jax.random.split(jax.random.key(1), CASES))
    ratio = np.asarray(targets["long_axis_mm"]) / 10
    assert ratio.min() < 0.9 and ratio.max() > 1.1
    for name in ("volume", "image"):
        old, new = np.asarray(getattr(before, name)), np.asarray(getattr(after, name))
        np.testing.assert_allclose([spread(case) / spread(old[0]) for case in new], ratio, rtol=0.06)


@pytest.mark.parametrize("key", [None, jax.random.split(jax.random.key(2), 24)], ids=["evaluation", "training"])
@pytest.mark.parametrize("size", [(25, 27, 27), (24, 25, 25), (22, 23, 23)])
def test_centres_are_counted_from_what_the_model_reads(size, key):
    offsets = np.random.default_rng(0).uniform(-2, 2, (CASES, 3))
    inputs, targets = jax.jit(Medical(BOTH).prepare)(both_pictures(offsets, size), key)
    volume = np.maximum(np.asarray(inputs.volume), -1)
    flat = volume.reshape(CASES, -1)
    found = position((volume - np.median(flat, axis=1).reshape(-1, 1, 1, 1) - 0.05) * 2) * 0.8
    assert np.abs(found - np.asarray(targets["center_mm"])).max() < (0.05 if key is None else 0.25)


def test_a_slice_leaves_the_centre_of_the_volume_alone():
    targets = {"center_mm": jnp.ones((2, 3))}
    x, spacing, kept, _ = augment(
        jax.random.split(jax.random.key(0)), jnp.zeros((2, 8, 8)), jnp.ones((2, 2)), targets, mode="affine"
    )
    np.testing.assert_array_equal(kept["center_mm"], np.ones((2, 3)))
    assert x.shape == (2, 8, 8) and spacing.shape == (2, 2)


def test_mirrors_are_drawn_for_each_case():
    x = jnp.tile(jnp.arange(4.0**3).reshape(1, 4, 4, 4), (256, 1, 1, 1))
    y = augment(jax.random.split(jax.random.key(0), 256), x, jnp.ones((256, 3)), {}, mode="flips")[0]
    assert len({np.asarray(case).tobytes() for case in y}) == 16  # eight mirrors, each turned or not


RECORDS = Config(
    model=ModelConfig(volume=VisionConfig(size=(8, 8, 8)), text_tokens=8),
    task=TaskConfig(fields=("nodule_present",), modality_dropout=0.4, augment="none"),
)


def prepared(count, has_volume, text, known, seed=0, config=RECORDS):
    """Inputs of training for `count` equal cases."""
    task = Medical(config)
    raw = {
        "case_id": [str(i) for i in range(count)],
        "volume": np.zeros((count, 8, 8, 8), np.int16),
        "volume_spacing": np.ones((count, 3), np.float32),
        "has_volume": np.full(count, has_volume),
        "table": np.full((count, len(RECORD_FIELDS)), 1.0 if known else np.nan, np.float32),
        "text": [text] * count,
        "target.nodule_present": np.zeros(count, np.float32),
    }
    inputs, _ = jax.jit(task.prepare)(
        jax.tree.map(jnp.asarray, task.collate(raw)), jax.random.split(jax.random.key(seed), count)
    )
    return np.asarray(inputs.has_volume), np.asarray(inputs.has_table), np.asarray(inputs.text_valid).any(axis=1)


def test_modality_dropout_hides_pictures_or_record_but_never_both():
    volume, table, text = prepared(4000, True, "text", True)
    np.testing.assert_array_equal(table, text)
    assert (volume | table).all()
    assert np.mean(~volume) == pytest.approx(0.4, abs=0.03)
    assert np.mean(~table) == pytest.approx(0.4, abs=0.03)
    edge = replace(RECORDS, task=replace(RECORDS.task, modality_dropout=0.5))
    volume, table, _ = prepared(4000, True, "text", True, config=edge)
    assert (volume | table).all() and not (volume & table).any()


@pytest.mark.parametrize(
    ("has_volume", "text", "known"), [(True, "", False), (False, "text", False), (False, "", True)]
)
def test_the_only_modality_of_a_case_is_never_hidden(has_volume, text, known):
    volume, table, words = prepared(500, has_volume, text, known)
    assert (volume == has_volume).all() and (table == known).all() and (words == bool(text)).all()
