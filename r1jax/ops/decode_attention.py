"""Latent attention of a step of decoding: from the products of its input to what `o_proj` takes, and the cache.

On a Hopper GPU it is three launches for a few rows (decode_attention_kernel.py, latent_attention_kernel.py), and for
many rows the keys are still read once; elsewhere it is `latent_attention` with its weight in two halves.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from r1jax.ops.latent_attention import PagedLatents, mix_latents, places, write_latents
from r1jax.ops.norm import rms_norm
from r1jax.ops.rope import turn_halves
from r1jax.ops.row_products import MOST
from r1jax.ops.self_test import agrees, takes_triton


class LatentWeights(NamedTuple):
    """Weights between the queries and `o_proj`."""

    keys: Float[Array, "N Hk R"]
    """Of `kv_b_proj`, what makes keys."""
    values: Float[Array, "N Hv R"]
    gain: Float[Array, " R"]
    """Of the latent's norm."""


class Turn(NamedTuple):
    """Rotary embedding of each token, the same in every layer."""

    cos: Float[Array, "T half"]
    sin: Float[Array, "T half"]


def decode_attention(
    q: Float[Array, "T Q"],
    kv: Float[Array, "T K"],
    weights: LatentWeights,
    cache: PagedLatents,
    positions: Int[Array, "B t"],
    valid: Bool[Array, "B t"],
    turn: Turn,
    *,
    eps: float,
    scale: float,
) -> tuple[Float[Array, "T O"], PagedLatents]:
    """Puts the tokens into the cache and attends to it.

    Args:
      q: Queries of all rows' tokens, in its first columns: [all heads without position | all heads' rotary numbers],
        these in half layout.
      kv: Latent and rotary key, in its last columns.
      weights: As the head's halves.
      cache: What came before.
      positions: Place of each token in its row.
      valid: Tokens that exist.
      turn: Of each token.
      eps: Of the latent's norm.
      scale: Factor on the scores.

    Returns:
      What `o_proj` takes, [T, N Hv], and the cache with the tokens in it.
    """
    if q.dtype == jnp.bfloat16 and takes_triton() and _fits(q, weights, cache, turn) and _kernels_agree():
        return _on_kernels(q, kv, weights, cache, positions, valid, turn, eps=eps, scale=scale)
    return decode_attention_reference(q, kv, weights, cache, positions, valid, turn, eps=eps, scale=scale)


def decode_attention_reference(
    q: Float[Array, "T Q"],
    kv: Float[Array, "T K"],
    weights: LatentWeights,
    cache: PagedLatents,
    positions: Int[Array, "B t"],
    valid: Bool[Array, "B t"],
    turn: Turn,
    *,
    eps: float,
    scale: float,
) -> tuple[Float[Array, "T O"], PagedLatents]:
    """`decode_attention` without kernels; arguments and results are those."""
    absorbed, q_rope, entries = _inputs(q, kv, weights, turn, eps)
    cache = write_latents(cache, entries.reshape(*positions.shape, -1), positions, valid)
    by_row = (x.reshape(*positions.shape, *x.shape[1:]) for x in (absorbed, q_rope))
    mixed = mix_latents(*by_row, cache, positions, valid, scale=scale)
    return _out(mixed.reshape(absorbed.shape), weights), cache


def _inputs(
    q: Float[Array, "T Q"], kv: Float[Array, "T K"], weights: LatentWeights, turn: Turn, eps: float
) -> tuple[Float[Array, "T N R"], Float[Array, "T N H"], Float[Array, "T C"]]:
    """Absorbed and rotary queries, and the entries of the cache."""
    (heads, wide, rank), rope = weights.keys.shape, 2 * turn.cos.shape[1]
    q_nope, q_rope, _ = jnp.split(q, [heads * wide, heads * (wide + rope)], axis=1)
    q_nope, q_rope = (part.reshape(len(q), heads, -1) for part in (q_nope, q_rope))
    latent, k_rope = jnp.split(kv[:, -rank - rope :], [rank], axis=1)
    entries = [rms_norm(latent, weights.gain, eps), _turned(k_rope[:, None], turn)[:, 0]]
    absorbed = jnp.einsum("TNH,NHR->TNR", q_nope, weights.keys)
    return absorbed, _turned(q_rope, turn), jnp.concatenate(entries, axis=1)


def _turned(x: Float[Array, "T N H"], turn: Turn) -> Float[Array, "T N H"]:
    """`apply_rope` in half layout."""
    halves = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(turn_halves(*halves, turn.cos[:, None], turn.sin[:, None]), axis=-1).astype(x.dtype)


def _out(mixed: Float[Array, "T N R"], weights: LatentWeights) -> Float[Array, "T O"]:
    return jnp.einsum("TNR,NHR->TNH", mixed, weights.values).reshape(len(mixed), -1)


def _fits(q: Float[Array, "T Q"], weights: LatentWeights, cache: PagedLatents, turn: Turn) -> bool:
    """Whether the kernel of attention takes such queries and such a cache."""
    from r1jax.ops import latent_attention_kernel as kernel

    if not isinstance(cache.pages, jax.Array) or cache.pages.dtype != q.dtype or cache.pages.size >= 2**31:
        return False  # codes, or more numbers than Triton's 32 bits count
    (heads, _, rank), rows = weights.keys.shape, len(cache.table)
    return kernel.fits(len(q) // rows * heads, rank, 2 * turn.cos.shape[1], cache.pages.shape[1])


def _on_kernels(
    q: Float[Array, "T Q"],
    kv: Float[Array, "T K"],
    weights: LatentWeights,
    cache: PagedLatents,
    positions: Int[Array, "B t"],
    valid: Bool[Array, "B t"],
    turn: Turn,
    *,
    eps: float,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "T O"], PagedLatents]:
    """With kernels; with many rows, what is no attention is left to libraries, which read weights once for all rows."""
    from r1jax.ops import decode_attention_kernel as around
    from r1jax.ops import latent_attention_kernel as kernel

    (heads, wide, rank), (rows, length) = weights.keys.shape, positions.shape
    sizes = around.Sizes(heads, wide, 2 * turn.cos.shape[1], rank)
    few = len(q) <= MOST and around.fits(sizes, weights.values.shape[1])
    if few:
        slot = jnp.where(valid, places(cache, positions), -1).reshape(-1)
        absorbed, q_rope, pages = around.absorb_and_write(
            q, kv, weights.keys, weights.gain, eps, cache.pages, slot, turn, sizes, interpret=interpret
        )
        cache = cache._replace(pages=pages)
    else:
        absorbed, q_rope, entries = _inputs(q, kv, weights, turn, eps)
        cache = write_latents(cache, entries.reshape(rows, length, -1), positions, valid)
    limit = jnp.repeat(jnp.where(valid, positions, -1), heads, axis=1)
    by_row = (x.reshape(rows, length * heads, -1) for x in (absorbed, q_rope))
    parts = kernel.attend_pages(*by_row, *cache, limit, scale=scale, interpret=interpret)
    if few:
        return around.expand(parts, weights.values, q.dtype, interpret=interpret), cache
    return _out(kernel.join(parts).astype(q.dtype).reshape(absorbed.shape), weights), cache


@functools.cache
def _kernels_agree() -> bool:
    """Tries the kernels on this device, for a few rows and for many: values, and what is then in the cache."""
    rng = np.random.default_rng(0)
    heads, wide, rope, rank, value, rows = 16, 32, 32, 128, 32, MOST + 1

    def normal(*shape: int, scale: float = 1) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(jnp.bfloat16)

    table = rng.permutation(rows * 3).reshape(rows, 3).astype(np.int32)
    positions = rng.integers(0, 96, (rows, 1)).astype(np.int32)
    angle = rng.uniform(0, 6, (rows, rope // 2)).astype(np.float32)

    def run(attend, q: Array, kv: Array, keys: Array, values: Array, pages: Array) -> Array:
        found = []
        for few in (2, rows):
            cache = PagedLatents(pages, jnp.asarray(table[:few]))
            turn = Turn(jnp.cos(angle[:few]), jnp.sin(angle[:few]))
            weights = LatentWeights(keys, values, jnp.ones(rank))
            places, there = jnp.asarray(positions[:few]), jnp.ones((few, 1), bool).at[0].set(few == 2)
            out, cache = attend(q[:few], kv[:few], weights, cache, places, there, turn, eps=1e-6, scale=0.1)
            found += [jnp.where(there, out, 0).reshape(-1), (cache.pages - pages).reshape(-1)]
        return jnp.concatenate(found)

    arrays = (
        *(normal(rows, heads * (wide + rope)), normal(rows, rank + rope)),
        *(normal(heads, wide, rank, scale=0.2), normal(heads, value, rank, scale=0.1)),
        normal(rows * 3, 32, rank + rope),
    )
    fast, slow = (functools.partial(run, attend) for attend in (_on_kernels, decode_attention_reference))
    return agrees("the kernels of a step's attention", fast, slow, arrays, gradients=False)
