"""Stochastic rounding: an update smaller than half a step of bf16 still moves the weight, on average by itself."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, PRNGKeyArray, UInt32

from r1jax.ops.hashed_bits import hashed_bits


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

    Args:
      key: One key.
      wide: Arrays in fp32, or of any type that shall stay.
      narrow: Arrays of the same shapes, in the types that are wanted.

    Returns:
      The tree; where the types are the same, its arrays as they are.
    """

    def one(i: int, x: Array, like: Array) -> Array:
        if x.dtype == like.dtype:
            return x
        rows, *rest = x.shape if x.ndim else (1,)
        bits = hashed_bits(jax.random.fold_in(key, i), jnp.arange(rows), tuple(rest))
        return stochastic_round(x, bits.reshape(x.shape))

    leaves, structure = jax.tree.flatten(wide)
    return structure.unflatten(
        [one(i, *pair) for i, pair in enumerate(zip(leaves, jax.tree.leaves(narrow), strict=True))]
    )
