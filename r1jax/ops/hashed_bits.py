"""Random bits as a function of a key, a row and a place in it, whatever else is computed beside them.

A case's bits are the same in a large batch, in a microbatch of it, on any number of devices and when a layer is
computed a second time. Threefry, vectorised over keys of single rows, would do too, but took a tenth of a training step
for dropout alone; JAX's `rbg` draws for a whole batch at once. This is for dropout and rounding, not for secrets.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, UInt32


def hashed_bits(key: PRNGKeyArray, rows: Int[Array, " B"], shape: tuple[int, ...]) -> UInt32[Array, "B ..."]:
    """Uniform bits of each place of each row.

    Args:
      key: One key; its first 64 bits count.
      rows: Number of each row; equal numbers give equal bits.
      shape: Of a row; fewer than 2^32 places.

    Returns:
      uint32 [B, *shape].
    """
    words = jax.random.key_data(key)
    # Two seeds a row: with one, the bits of two rows would be the same sequence, shifted or permuted.
    first = mix_bits(mix_bits(rows.astype(jnp.uint32) + words[0]) ^ words[1])
    second = mix_bits(first + jnp.uint32(0x9E3779B9))
    place = jax.lax.iota(jnp.uint32, math.prod(shape))[None, :]
    bits = mix_bits(mix_bits(place ^ first[:, None]) + second[:, None])
    return bits.reshape(rows.shape[0], *shape)


def mix_bits(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32-bit words in which every input bit flips each output bit about half the time (MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
