"""Stochastic rounding: only the two neighbours, in the right proportion; exact and special numbers stay."""

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.ops.hashed_bits import hashed_bits
from r1jax.ops.rounding import round_like, stochastic_round


def bits(count, seed=0):
    return hashed_bits(jax.random.key(seed), jnp.arange(1), (count,))[0]


def test_the_mean_is_the_number():
    count = 1 << 16
    for value in (1.001, -3.14159, 1e-20, 65000.7):
        x = jnp.full(count, value, jnp.float32)
        got = np.asarray(stochastic_round(x, bits(count)), np.float64)
        low, high = got.min(), got.max()
        step = high - low
        assert low < np.float32(value) < high and set(got) == {low, high}
        assert step <= abs(value) * 2**-7
        assert abs(got.mean() - np.float32(value)) < 5 * step / 2 / np.sqrt(count)


def test_what_bf16_holds_is_not_moved():
    exact = jnp.asarray([0.0, -0.0, 1.0, -2.5, 2.0**-130, jnp.inf, -jnp.inf], jnp.float32)
    np.testing.assert_array_equal(stochastic_round(exact, bits(7)).astype(jnp.float32), exact)
    nan = jnp.full(1000, jnp.nan, jnp.float32)
    assert np.isnan(np.asarray(stochastic_round(nan, bits(1000)), np.float32)).all()


def test_small_updates_add_up():
    """A thousand updates of a hundredth of a step: rounding to nearest would lose them all."""
    start = jnp.ones((64, 64), jnp.bfloat16)

    @jax.jit
    def many(x):
        def update(i, x):
            wide = {"w": x.astype(jnp.float32) + 2.0**-7 / 100}
            return round_like(jax.random.fold_in(jax.random.key(0), i), wide, {"w": x})["w"]

        return jax.lax.fori_loop(0, 1000, update, x)

    moved = np.asarray(many(start), np.float64) - 1
    assert abs(moved.mean() - 1000 * 2.0**-7 / 100) < 0.01 * moved.mean()


def test_arrays_are_rounded_independently_and_wide_ones_not_at_all():
    wide = {"a": jnp.full((8, 8), 1.001), "b": jnp.full((8, 8), 1.001), "c": jnp.full(3, 1.001), "n": jnp.int32(3)}
    narrow = wide | {name: wide[name].astype(jnp.bfloat16) for name in "ab"}
    got = round_like(jax.random.key(0), wide, narrow)
    assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in narrow.items()}
    assert np.any(got["a"] != got["b"]) and got["c"] is wide["c"] and got["n"] is wide["n"]


def test_no_part_of_an_array_draws_what_another_does():
    """Ups and downs of rows, columns and halves agree as often as fair coins do: 8,192 pairs, five deviations."""
    x = jnp.full((128, 2, 64), 1 + 2.0**-8, jnp.float32)
    up = np.asarray(round_like(jax.random.key(1), {"w": x}, {"w": x.astype(jnp.bfloat16)})["w"] > 1)
    for axis in range(3):
        one, other = np.split(up, 2, axis)
        assert abs((one == other).mean() - 0.5) < 5 * 0.5 / np.sqrt(one.size)
    assert abs((up[:-1] == up[1:]).mean() - 0.5) < 5 * 0.5 / np.sqrt(up[1:].size)
