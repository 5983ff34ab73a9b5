"""Attention over a paged cache of latents: absorbed (DeepSeek-V2, section 2.1.2), and the expanded form beside it.

The cache holds, for each token and layer, one latent of R numbers and one rotary key of H numbers in half layout,
which all heads share. It is a pool of pages; a table gives each row of the batch its pages, so that rows of unequal
length take no more than they need (Kwon et al. 2023).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from r1jax.ops.attention import dot_product_attention_reference

TOKENS_A_STEP = 1024  # keys that one step of the loop reads; whole pages


class PagedLatents(NamedTuple):
    """Latents and rotary keys of one layer: P pages of `page` tokens, n pages a row at most."""

    pages: Float[Array, "P page C"]
    """C = R + H numbers a token, the latent first."""
    table: Int[Array, "B n"]
    """Page of each row's tokens 0..page-1, page..2 page-1, ...; what lies beyond a row's last page is never read."""


def write_latents(
    cache: PagedLatents,
    entries: Float[Array, "B T C"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> PagedLatents:
    """Puts tokens into the cache.

    Args:
      cache: The pool and its table.
      entries: Latent and rotary key of each token.
      positions: Place of each token in its row, from 0.
      valid: Tokens to write; others leave the cache as it is.

    Returns:
      The cache with the tokens in it; what stood at their places before is gone.
    """
    count, page, width = cache.pages.shape
    column = jnp.minimum(positions // page, cache.table.shape[1] - 1)
    place = jnp.take_along_axis(cache.table, column, axis=1) * page + positions % page
    place = jnp.where(valid, place, count * page)  # outside of the pool: dropped
    flat = cache.pages.reshape(-1, width).at[place.reshape(-1)]
    entries = entries.astype(cache.pages.dtype).reshape(-1, width)
    return cache._replace(pages=flat.set(entries, mode="drop").reshape(cache.pages.shape))


def latent_attention(
    q_nope: Float[Array, "B T N Hk"],
    q_rope: Float[Array, "B T N H"],
    kv_b: Float[Array, "O R"],
    cache: PagedLatents,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    *,
    scale: float,
) -> Float[Array, "B T N Hv"]:
    """Absorbed attention: queries go into the latent space, so that no key and no value is ever expanded.

    With W_k and W_v the halves of `kv_b` of a head, its score is (W_k^T q_nope) . c + q_rope . k_rope and its output
    W_v sum_s p_s c_s. An online softmax in fp32 walks over the pages up to the longest row that is still alive.

    Args:
      q_nope: Queries without position.
      q_rope: Rotary queries, turned, in half layout.
      kv_b: Weight of `kv_b_proj`, [N (Hk + Hv), R].
      cache: Keys; the queries' own tokens are in it already.
      positions: Place of each query in its row; it sees the places 0 to its own.
      valid: Queries that count; the others get zeros or something finite, and do not prolong the loop.
      scale: Factor on the scores.

    Returns:
      Array of q_nope's dtype.
    """
    pages, table = cache
    batch, length, heads, width = q_nope.shape
    rank, page = kv_b.shape[1], pages.shape[1]
    w_k, w_v = jnp.split(kv_b.reshape(heads, -1, rank), [width], axis=1)
    absorbed = jnp.einsum("BTNH,NHR->BTNR", q_nope, w_k.astype(q_nope.dtype))
    q = jnp.concatenate([absorbed, q_rope], axis=-1)

    columns = min(table.shape[1], max(1, TOKENS_A_STEP // page))
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % columns)))
    step = columns * page
    last = jnp.max(jnp.where(valid, positions, -1))
    lowest = jnp.finfo(jnp.float32).min

    def read(i: Int[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, mixed = carry
        chosen = jax.lax.dynamic_slice_in_dim(table, i * columns, columns, axis=1)
        keys = pages[chosen].reshape(batch, step, -1)
        seen = (i * step + jnp.arange(step))[None, None, :] <= positions[:, :, None]
        scores = jnp.einsum("BTNC,BSC->BTNS", q, keys, preferred_element_type=jnp.float32) * scale
        scores = jnp.where(seen[:, :, None, :], scores, lowest)
        rise = jnp.maximum(highest, jnp.max(scores, axis=-1))
        # Where a query sees nothing of this step, `rise` may still be `lowest`: then the weights must be 0, not 1.
        weights = jnp.where(seen[:, :, None, :], jnp.exp(scores - rise[..., None]), 0)
        shrink = jnp.exp(highest - rise)
        part = jnp.einsum(
            "BTNS,BSR->BTNR", weights.astype(keys.dtype), keys[..., :rank], preferred_element_type=jnp.float32
        )
        return rise, total * shrink + jnp.sum(weights, axis=-1), mixed * shrink[..., None] + part

    none = jnp.zeros((batch, length, heads), jnp.float32)
    start = (jnp.full_like(none, lowest), none, jnp.zeros((batch, length, heads, rank), jnp.float32))
    _, total, mixed = jax.lax.fori_loop(0, last // step + 1, read, start)
    latent = mixed / jnp.where(total > 0, total, 1)[..., None]
    return jnp.einsum("BTNR,NHR->BTNH", latent.astype(q_nope.dtype), w_v.astype(q_nope.dtype))


def latent_attention_reference(
    q_nope: Float[Array, "B T N Hk"],
    q_rope: Float[Array, "B T N H"],
    kv_b: Float[Array, "O R"],
    cache: PagedLatents,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    *,
    scale: float,
) -> Float[Array, "B T N Hv"]:
    """`latent_attention` with keys and values of the whole cache expanded anew: N times the memory, obviously right.

    Args:
      q_nope: Queries without position.
      q_rope: Rotary queries, turned, in half layout.
      kv_b: Weight of `kv_b_proj`.
      cache: Keys.
      positions: Place of each query.
      valid: Not read: every query is computed.
      scale: Factor on the scores.

    Returns:
      Array of q_nope's dtype.
    """
    del valid
    batch, length, heads, width = q_nope.shape
    keys = cache.pages[cache.table].reshape(batch, -1, cache.pages.shape[-1])
    latent, k_rope = jnp.split(keys, [kv_b.shape[1]], axis=-1)
    kv = jnp.einsum("BSR,OR->BSO", latent, kv_b.astype(keys.dtype)).reshape(batch, keys.shape[1], heads, -1)
    k_nope, v = jnp.split(kv, [width], axis=-1)
    shared = jnp.broadcast_to(k_rope[:, :, None, :], (*k_nope.shape[:3], k_rope.shape[-1]))
    k, q = jnp.concatenate([k_nope, shared], axis=-1), jnp.concatenate([q_nope, q_rope], axis=-1)
    places = jnp.broadcast_to(jnp.arange(keys.shape[1])[None], keys.shape[:2])
    mixed = [  # one query after another: each has its own set of keys
        dot_product_attention_reference(
            q[:, t : t + 1], k, v, scale=scale, causal=False, valid=places <= positions[:, t : t + 1]
        )
        for t in range(length)
    ]
    return jnp.concatenate(mixed, axis=1)
