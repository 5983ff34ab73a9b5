"""Rotary embedding against multiplication of complex numbers, YaRN against its definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import YarnConfig
from r1jax.ops.rope import apply_rope, inverse_frequencies, softmax_scale, yarn_magnitude

PUBLISHED = YarnConfig(factor=40.0)  # DeepSeek-V3: 64 rotary channels, 4096 original positions


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("magnitude", [1.0, 1.3])
def test_equals_complex_multiplication(interleave, magnitude):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 7, 3, 8)).astype(np.float32)
    positions = rng.integers(0, 500, (2, 7)).astype(np.int32)
    frequencies = inverse_frequencies(8, 10000.0, YarnConfig())
    pairs = x[..., 0::2] + 1j * x[..., 1::2] if interleave else x[..., :4] + 1j * x[..., 4:]
    turned = pairs * magnitude * np.exp(1j * positions[..., None].astype(float) * frequencies)[:, :, None]
    out = apply_rope(jnp.asarray(x), jnp.asarray(positions), frequencies, interleave=interleave, magnitude=magnitude)
    assert out.dtype == jnp.float32
    # fp32 angles of a few hundred radians are right to about 3e-5.
    np.testing.assert_allclose(out, np.concatenate([turned.real, turned.imag], -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("interleave", [True, False])
def test_scores_depend_on_distance_only(interleave):
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 16)), jnp.float32) for _ in range(2))
    frequencies = inverse_frequencies(16, 10000.0, YarnConfig())

    def score(t, s):
        turned = [
            np.asarray(apply_rope(x, jnp.full((1, 1), at), frequencies, interleave=interleave))
            for x, at in ((q, t), (k, s))
        ]
        return float(np.sum(turned[0] * turned[1]))

    assert score(5, 2) == pytest.approx(score(45, 42), abs=1e-4)
    assert score(0, 0) == pytest.approx(float(jnp.sum(q * k)), abs=1e-5)
    assert abs(score(5, 2) - score(5, 3)) > 1e-2


def test_position_zero_only_orders_the_channels():
    x = jnp.arange(8.0)[None, None, None]
    out = apply_rope(x, jnp.zeros((1, 1), jnp.int32), inverse_frequencies(8, 1e4, PUBLISHED), interleave=True)
    np.testing.assert_array_equal(out.ravel(), [0, 2, 4, 6, 1, 3, 5, 7])


def test_bf16_input_is_turned_in_fp32():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 3, 1, 8)), jnp.bfloat16)
    positions, frequencies = jnp.asarray([[1001, 2003, 3001]]), inverse_frequencies(8, 1e4, YarnConfig())
    out = apply_rope(x, positions, frequencies, interleave=True)
    exact = apply_rope(x.astype(jnp.float32), positions, frequencies, interleave=True)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(exact.astype(jnp.bfloat16), np.float32))


def test_without_yarn_frequencies_are_geometric():
    frequencies = inverse_frequencies(64, 10000.0, YarnConfig())
    np.testing.assert_allclose(frequencies, [10000.0 ** (-i / 32) for i in range(32)], rtol=1e-6)


def test_yarn_keeps_fast_pairs_and_divides_slow_ones():
    plain = inverse_frequencies(64, 10000.0, YarnConfig())
    ratio = plain / inverse_frequencies(64, 10000.0, PUBLISHED)
    # Pairs that turn 32 times and once in 4096 positions: 64 ln(4096 / (2 pi r)) / (2 ln 10000) = 10.47 and 22.51.
    np.testing.assert_allclose(ratio[:11], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[23:], 40, rtol=1e-6)
    assert np.all(np.diff(ratio[10:24]) > 0)
    ramp = (16 - 10) / (23 - 10)
    np.testing.assert_allclose(1 / ratio[16], ramp / 40 + 1 - ramp, rtol=1e-6)


@pytest.mark.parametrize("original", [4, 10**6])
def test_yarn_ramp_stays_within_the_pairs(original):
    config = YarnConfig(factor=4.0, original_max_position_embeddings=original)
    ratio = inverse_frequencies(8, 10000.0, YarnConfig()) / inverse_frequencies(8, 10000.0, config)
    assert np.isfinite(ratio).all() and ratio.min() >= 1 - 1e-6 and ratio.max() <= 4 + 1e-5


def test_softmax_scale_of_the_published_model():
    assert yarn_magnitude(40.0, 1.0) == pytest.approx(1.3689, abs=1e-4)
    assert softmax_scale(192, PUBLISHED) == pytest.approx(192**-0.5 * 1.8739, rel=1e-4)
    assert softmax_scale(192, YarnConfig()) == pytest.approx(192**-0.5)
    # V2-Lite's mscale of 0.707 acts on the scores; cosine and sine keep m(mscale) / m(mscale_all_dim) = 1
    lite = YarnConfig(factor=40.0, mscale=0.707, mscale_all_dim=0.707)
    assert softmax_scale(192, lite) == pytest.approx(192**-0.5 * (1 + 0.0707 * np.log(40)) ** 2)
