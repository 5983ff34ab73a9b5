"""Attention over a paged cache of latents: absorbed (DeepSeek-V2, section 2.1.2), and the expanded form beside it.

The cache holds, for each token and layer, one latent of R numbers and one rotary key of H numbers in half layout,
which all heads share. It is a pool of pages; a table gives each row of the batch its pages, so that rows of unequal
length take no more than they need (Kwon et al. 2023). Latents may be codes of 8 bits with a scale a token: the scale
joins the scores and the weights of the softmax, so that codes are what is read and what is multiplied.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from r1jax.ops.attention import dot_product_attention_reference
from r1jax.ops.quantize import TYPE, Quantized, block_of, dequantize, quantize

TOKENS_A_STEP = 1024  # keys that one step of the loop reads; whole pages


class Coded(NamedTuple):
    """Pages whose latents are codes; rotary keys, a ninth of the numbers and the ones that errors hurt, are not."""

    latent: Quantized
    """[P, page, R], a scale a token."""
    rope: Float[Array, "P page H"]


Pages = Float[Array, "P page C"] | Coded
"""C = R + H numbers a token, the latent first."""


class PagedLatents(NamedTuple):
    """Latents and rotary keys of one layer: P pages of `page` tokens, n pages a row at most."""

    pages: Pages
    table: Int[Array, "B n"]
    """Page of each row's tokens 0..page-1, page..2 page-1, ...; what lies beyond a row's last page is never read."""


def empty_pages(
    kind: Literal["float", "int8", "fp8"], pages: int, page: int, rank: int, rope: int, dtype: DTypeLike
) -> Pages:
    """A pool with nothing in it.

    Args:
      kind: How latents are held.
      pages: P.
      page: Tokens of each.
      rank: R.
      rope: H.
      dtype: Of what is not codes.

    Returns:
      Zeros.
    """
    if kind == "float":
        return jnp.zeros((pages, page, rank + rope), dtype)
    codes = Quantized(jnp.zeros((pages, page, rank), TYPE[kind]), jnp.zeros((pages, page, 1), jnp.float32))
    return Coded(codes, jnp.zeros((pages, page, rope), dtype))


def bytes_a_token(pages: Pages) -> int:
    """What a token takes in the pool of one layer."""
    return sum(x.shape[2] * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(pages))


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
    count, page = jax.tree.leaves(cache.pages)[0].shape[:2]
    place = jnp.where(valid, places(cache, positions), count * page).reshape(-1)  # outside of the pool: dropped

    def put(pool: Array, new: Array) -> Array:
        flat = pool.reshape(count * page, -1).at[place]
        return flat.set(new.astype(pool.dtype).reshape(len(place), -1), mode="drop").reshape(pool.shape)

    return cache._replace(pages=jax.tree.map(put, cache.pages, _held_as(cache.pages, entries)))


def places(cache: PagedLatents, positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Where in the pool the token of each position of its row lies, page * tokens a page + offset."""
    page = jax.tree.leaves(cache.pages)[0].shape[1]
    column = jnp.minimum(positions // page, cache.table.shape[1] - 1)
    return jnp.take_along_axis(cache.table, column, axis=1) * page + positions % page


def _held_as(pages: Pages, entries: Float[Array, "B T C"]) -> Float[Array, "B T C"] | Coded:
    """Entries as the pool holds them."""
    if not isinstance(pages, Coded):
        return entries
    latent, rope = jnp.split(entries, [pages.latent.shape[-1]], axis=-1)
    return Coded(quantize(latent, "int8" if pages.latent.values.dtype == jnp.int8 else "fp8"), rope)


def latent_attention(
    q_nope: Float[Array, "B T N Hk"],
    q_rope: Float[Array, "B T N H"],
    kv_b: Float[Array, "O R"] | Quantized,
    cache: PagedLatents,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    *,
    scale: float,
) -> Float[Array, "B T N Hv"]:
    """Absorbed attention: queries go into the latent space, so that no key and no value is ever expanded.

    With W_k and W_v the halves of `kv_b` of a head, its score is (W_k^T q_nope) . c + q_rope . k_rope and its output
    W_v sum_s p_s c_s.

    Args:
      q_nope: Queries without position.
      q_rope: Rotary queries, turned, in half layout.
      kv_b: Weight of `kv_b_proj`, [N (Hk + Hv), R]; the scales of codes join queries and outputs.
      cache: Keys; the queries' own tokens are in it already.
      positions: Place of each query in its row; it sees the places 0 to its own.
      valid: Queries that count; the others get zeros or something finite, and do not prolong the loop.
      scale: Factor on the scores.

    Returns:
      Array of q_nope's dtype.
    """
    (heads, width), dtype = q_nope.shape[2:], q_nope.dtype
    matrix, by_row = _factors(kv_b, dtype)
    w_k, w_v = jnp.split(matrix.reshape(heads, -1, kv_b.shape[1]), [width], axis=1)
    if by_row is not None:
        by_k, by_v = jnp.split(by_row.reshape(heads, -1), [width], axis=1)
        q_nope = (q_nope.astype(jnp.float32) * by_k[None, None]).astype(dtype)
    absorbed = jnp.einsum("BTNH,NHR->BTNR", q_nope, w_k)
    latent = mix_latents(absorbed, q_rope, cache, positions, valid, scale=scale)
    out = jnp.einsum("BTNR,NHR->BTNH", latent, w_v)
    return out if by_row is None else (out.astype(jnp.float32) * by_v[None, None]).astype(dtype)


def mix_latents(
    absorbed: Float[Array, "B T N R"],
    q_rope: Float[Array, "B T N H"],
    cache: PagedLatents,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    *,
    scale: float,
) -> Float[Array, "B T N R"]:
    """The mean latent of what each query sees, weighted by the softmax of its scores.

    An online softmax in fp32 walks over the pages up to the longest row that is still alive.

    Args:
      absorbed: Queries in the latent space, W_k^T q_nope.
      q_rope: Rotary queries, turned, in half layout.
      cache: As in `latent_attention`.
      positions: As in `latent_attention`.
      valid: As in `latent_attention`.
      scale: Factor on the scores.

    Returns:
      Array of the queries' dtype.
    """
    pages, table = cache
    (batch, length, heads, rank), dtype = absorbed.shape, absorbed.dtype
    page = jax.tree.leaves(pages)[0].shape[1]
    q = jnp.concatenate([absorbed, q_rope], axis=-1)
    columns = min(table.shape[1], max(1, TOKENS_A_STEP // page))
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % columns)))
    step = columns * page
    limit = jnp.where(valid, positions, -1)
    lowest = jnp.finfo(jnp.float32).min

    def read(i: int | Int[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, mixed = carry
        chosen = jax.lax.dynamic_slice_in_dim(table, i * columns, columns, axis=1)
        keys, by_key = _keys(pages, chosen, dtype)
        seen = (i * step + jnp.arange(step))[None, None, :] <= limit[:, :, None]
        if by_key is None:
            scores = jnp.einsum("BTNC,BSC->BTNS", q, keys, preferred_element_type=jnp.float32) * scale
        else:
            latent = jnp.einsum("BTNR,BSR->BTNS", absorbed, keys[..., :rank], preferred_element_type=jnp.float32)
            turned = jnp.einsum("BTNH,BSH->BTNS", q_rope, keys[..., rank:], preferred_element_type=jnp.float32)
            scores = (latent * by_key[:, None, None] + turned) * scale
        scores = jnp.where(seen[:, :, None, :], scores, lowest)
        rise = jnp.maximum(highest, jnp.max(scores, axis=-1))
        # Where a query sees nothing of this step, `rise` may still be `lowest`: then the weights must be 0, not 1.
        weights = jnp.where(seen[:, :, None, :], jnp.exp(scores - rise[..., None]), 0)
        shrink, summed = jnp.exp(highest - rise), jnp.sum(weights, axis=-1)
        weights = weights if by_key is None else weights * by_key[:, None, None]
        part = jnp.einsum("BTNS,BSR->BTNR", weights.astype(dtype), keys[..., :rank], preferred_element_type=jnp.float32)
        return rise, total * shrink + summed, mixed * shrink[..., None] + part

    none = jnp.zeros((batch, length, heads), jnp.float32)
    start = (jnp.full_like(none, lowest), none, jnp.zeros((batch, length, heads, rank), jnp.float32))
    if table.shape[1] == columns:  # a GPU would wait for the host to count to one
        _, total, mixed = read(0, start)
    else:
        _, total, mixed = jax.lax.fori_loop(0, jnp.max(limit) // step + 1, read, start)
    return (mixed / jnp.where(total > 0, total, 1)[..., None]).astype(dtype)


def _factors(kv_b: Float[Array, "O R"] | Quantized, dtype: DTypeLike) -> tuple[Float[Array, "O R"], Array | None]:
    """What is multiplied, and a factor of each of its rows; None is 1."""
    if not isinstance(kv_b, Quantized):
        return kv_b.astype(dtype), None
    if block_of(kv_b) is None and kv_b.zero is None and kv_b.balance is None:
        return kv_b.values.astype(dtype), kv_b.scale[:, 0].astype(jnp.float32)
    return dequantize(kv_b, dtype), None


def _keys(
    pages: Pages, chosen: Int[Array, "B n"], dtype: DTypeLike
) -> tuple[Float[Array, "B S C"], Float[Array, "B S"] | None]:
    """Latents and rotary keys of some pages as they are multiplied, and a factor of each latent; None is 1."""
    found = jax.tree.map(lambda pool: pool[chosen].reshape(len(chosen), -1, pool.shape[-1]), pages)
    if not isinstance(found, Coded):
        return found, None
    return jnp.concatenate([found.latent.values.astype(dtype), found.rope], axis=-1), found.latent.scale[..., 0]


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
    pages = cache.pages
    if isinstance(pages, Coded):
        pages = jnp.concatenate([dequantize(pages.latent, pages.rope.dtype), pages.rope], axis=-1)
    keys = pages[cache.table].reshape(batch, -1, pages.shape[-1])
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
