"""Stochastic rounding: an update smaller than half a step of bf16 still moves the weight, on average by itself."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, PRNGKeyArray, UInt32

from r1jax.ops.hashed_bits import mix_bits


def stochastic_round(x: Float32[Array, "*shape"], bits: UInt32[Array, "*shape"]) -> BFloat16[Array, "*shape"]:
    """Rounds to one of the two neighbours in bf16, with chances that make the mean the number itself.

    Args:
      x: Numbers; infinite ones and NaN stay what they are.
      bits: Random; the lower 16 count.

    Returns:
      The neighbours that were drawn.
    """
    # bf16 is the upper half of fp32: a random number below one step is added, and the lower half cut off.
    words = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits & 0xFFFF)
    rounded = jax.lax.bitcast_convert_type(words & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def round_like(key: PRNGKeyArray, wide: Any, narrow: Any) -> Any:
    """Rounds a tree to the types of another, each array with random numbers of its own.

    A number's bits are a hash of its place in the array and of two words of that array. The words of all arrays are
    drawn in one call: a key for each would be a hundred operations on single numbers, for each of some hundred arrays,
    with which a step took more than twice as long to compile.

    Args:
      key: One key.
      wide: Arrays in fp32, or of any type that shall stay; in one, numbers 2^32 places apart draw alike.
      narrow: Arrays of the same shapes, in the types that are wanted.

    Returns:
      The tree; where the types are the same, its arrays as they are.
    """
    leaves, structure = jax.tree.flatten(wide)
    words = jax.random.bits(key, (2, len(leaves)), jnp.uint32)
    pairs = zip(leaves, jax.tree.leaves(narrow), strict=True)
    return structure.unflatten(
        [x if x.dtype == like.dtype else _rounded(x, words[:, i]) for i, (x, like) in enumerate(pairs)]
    )


@jax.jit  # traced once for each shape, not once for each array
def _rounded(x: Float32[Array, "*shape"], words: UInt32[Array, " 2"]) -> BFloat16[Array, "*shape"]:
    # A sum of indices, not one index reshaped: then every device computes the places of its part alone.
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        stride = jnp.uint32(math.prod(x.shape[axis + 1 :]) % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * stride
    return stochastic_round(x, mix_bits(mix_bits(place ^ words[0]) + words[1]))
