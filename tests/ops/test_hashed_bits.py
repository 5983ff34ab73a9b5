"""Bits belong to key, row and place alone; they are uniform and independent as far as simple statistics tell."""

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.ops.hashed_bits import hashed_bits


def draw(rows, shape, seed=0):
    return np.asarray(hashed_bits(jax.random.key(seed), jnp.asarray(rows, jnp.int32), shape))


def test_a_row_has_its_bits_whatever_is_drawn_beside_it():
    whole = draw(range(8), (5, 3))
    assert whole.shape == (8, 5, 3) and whole.dtype == np.uint32
    np.testing.assert_array_equal(draw([6, 1], (5, 3)), whole[[6, 1]])
    inside = jax.jit(lambda row: hashed_bits(jax.random.key(0), row[None], (5, 3)))(jnp.int32(4))
    np.testing.assert_array_equal(inside[0], whole[4])


def test_keys_and_rows_and_places_differ():
    one, other = draw(range(64), (256,)), draw(range(64), (256,), seed=1)
    assert len(np.unique(np.concatenate([one, other]))) > 2 * 64 * 256 - 20  # 2^32 values: a handful meet by chance


def test_bits_are_even_and_independent():
    rows, places = 512, 512
    bits = draw(range(rows), (places,))
    each = ((bits[..., None] >> np.arange(32, dtype=np.uint32)) & 1).astype(np.float64) - 0.5
    count = rows * places
    bound = 5 / (2 * np.sqrt(count))  # five standard errors of a mean of values of +-1/2
    assert np.abs(each.mean((0, 1))).max() < bound
    correlation = np.einsum("rpi,rpj->ij", each, each) / count - np.eye(32) / 4
    assert np.abs(correlation).max() < bound / 2
    for axis in (0, 1):  # neighbours
        near = (np.roll(each, 1, axis=axis) * each).mean((0, 1))
        assert np.abs(near).max() < bound / 2
    high = bits >> 24
    counts = np.bincount(high.ravel(), minlength=256)
    chi_squared = ((counts - count / 256) ** 2 / (count / 256)).sum()
    assert abs(chi_squared - 255) < 5 * np.sqrt(2 * 255)


def test_no_two_rows_share_a_sequence():
    """Shifted or permuted copies would drop out together."""
    bits = draw(range(40), (4096,))
    sets = [set(row.tolist()) for row in bits]
    assert max(len(a & b) for i, a in enumerate(sets) for b in sets[:i]) <= 2
