"""The root mean square norm against numpy: over the channels of each row, or over whole pictures."""

import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.ops.norm import rms_norm

EPS = 1e-2


@pytest.mark.parametrize(
    ("shape", "first_axis"),
    [((8,), -1), ((5, 8), -1), ((2, 3, 8), -1), ((2, 3, 8), -2), ((2, 5, 6, 8), 1), ((2, 3, 4, 5, 8), 1)],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_mean_is_over_the_first_axis_and_all_after_it(shape, first_axis, dtype):
    rng = np.random.default_rng(0)
    x, gain = jnp.asarray(rng.standard_normal(shape), dtype), rng.standard_normal(shape[-1])
    y = rms_norm(x, jnp.asarray(gain, jnp.float32), EPS, first_axis)
    assert y.dtype == dtype and y.shape == shape
    wide, expected = np.asarray(x, np.float64), np.zeros(shape)
    for i in np.ndindex(shape[:first_axis]):
        expected[i] = wide[i] / np.sqrt(np.mean(wide[i] ** 2) + EPS) * gain
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8 if dtype == jnp.bfloat16 else 1e-5)


def test_over_a_picture_a_bright_place_stays_brighter_than_a_dim_one():
    dim = np.random.default_rng(0).standard_normal((1, 1, 1, 8))
    x, gain = jnp.asarray(np.concatenate([dim, 10 * dim], axis=2), jnp.float32), jnp.ones(8)
    for first_axis, brighter in ((-1, 1), (1, 10)):
        y = np.asarray(rms_norm(x, gain, 1e-12, first_axis))
        np.testing.assert_allclose(y[:, :, 1], brighter * y[:, :, 0], rtol=1e-5)
