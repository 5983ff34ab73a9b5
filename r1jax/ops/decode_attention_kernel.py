"""What stands before and after the attention of a step of decoding, in one launch each; Pallas for Triton.

Before it: queries go into the latent space and are turned, and the new latents go into the cache. After it: the parts
of the keys are joined and leave the latent space. Of each a compiler makes several launches.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from r1jax.ops.latent_attention_kernel import Parts
from r1jax.ops.rope import turn_halves

CHUNK = 128
"""Latent numbers that a program makes of a head's query."""
ROWS = 32
"""Rows of the values' weight that a program takes."""
SPLITS = 16
"""Parts that are joined at a time."""


class Sizes(NamedTuple):
    """Widths; heads are N, and a query is [all heads without position | all heads' rotary numbers, in half layout]."""

    heads: int
    nope: int
    rope: int
    rank: int


def fits(sizes: Sizes, value: int) -> bool:
    """Whether all widths are powers of two, so that a program reads whole tiles."""
    widths = sizes.nope, sizes.rope, sizes.rank, value
    return all(n & (n - 1) == 0 for n in widths) and sizes.rope >= 32 and sizes.rank >= CHUNK and value >= ROWS


def absorb_and_write(
    q: Float[Array, "T Q"],
    kv: Float[Array, "T K"],
    w_k: Float[Array, "N Hk R"],
    gain: Float[Array, " R"],
    eps: float,
    pages: Float[Array, "P page C"],
    slot: Int[Array, " T"],
    turn: tuple[Float[Array, "T half"], Float[Array, "T half"]],
    sizes: Sizes,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "T N R"], Float[Array, "T N H"], Float[Array, "P page C"]]:
    """Queries as the cache's keys meet them, and the cache with the tokens' own latents in it.

    Args:
      q: Queries; columns behind N (Hk + H) are not read.
      kv: Latent and rotary key, in its last R + H columns.
      w_k: The keys' half of `kv_b_proj`.
      gain: Of the latent's norm.
      eps: Of the latent's norm.
      pages: The pool, which is written in place where it is not needed afterwards.
      slot: Place of each token in the pool, page * tokens a page + offset; -1 writes nothing.
      turn: Cosine and sine of each token's rotary pairs.
      sizes: Widths.
      interpret: Whether JAX computes it without Triton.

    Returns:
      Absorbed queries, rotary queries and the pool.
    """
    (n, wide, rope, rank), page = sizes, pages.shape[1]
    chunks, half, first = rank // CHUNK, rope // 2, kv.shape[1] - rank - rope

    def turned(ref: Any, row: Array, at: Any, cos: Array, sin: Array) -> tuple[Array, Array]:
        a, b = (ref[row, pl.ds(at + i * half, half)].astype(jnp.float32) for i in range(2))
        return turn_halves(a, b, cos, sin)

    def absorb_kernel(
        q_ref: Any, kv_ref: Any, w_ref: Any, gain_ref: Any, _: Any, slot_ref: Any, cos_ref: Any, sin_ref: Any, *out: Any
    ) -> None:
        absorbed_ref, rope_ref, pool_ref = out
        part, row = pl.program_id(0), pl.program_id(1)
        cos, sin = cos_ref[row, :], sin_ref[row, :]

        @pl.when(part < n * chunks)
        def _() -> None:
            head, chunk = part // chunks, part % chunks
            own = q_ref[row, pl.ds(head * wide, wide)].astype(jnp.float32)
            weight = w_ref[head, :, pl.ds(chunk * CHUNK, CHUNK)].astype(jnp.float32)
            result = jnp.sum(own[:, None] * weight, axis=0)
            absorbed_ref[row, head, pl.ds(chunk * CHUNK, CHUNK)] = result.astype(absorbed_ref.dtype)

            @pl.when(chunk == 0)
            def _() -> None:
                for i, x in enumerate(turned(q_ref, row, n * wide + head * rope, cos, sin)):
                    rope_ref[row, head, pl.ds(i * half, half)] = x.astype(rope_ref.dtype)

        @pl.when((part == n * chunks) & (slot_ref[row] >= 0))
        def _() -> None:
            at = slot_ref[row] // page, slot_ref[row] % page
            latent = kv_ref[row, pl.ds(first, rank)].astype(jnp.float32)
            latent = latent * jax.lax.rsqrt(jnp.sum(latent * latent) / rank + eps) * gain_ref[...]
            pool_ref[*at, pl.ds(0, rank)] = latent.astype(pool_ref.dtype)
            for i, x in enumerate(turned(kv_ref, row, first + rank, cos, sin)):
                pool_ref[*at, pl.ds(rank + i * half, half)] = x.astype(pool_ref.dtype)

    count = len(q)
    call = pl.pallas_call(
        absorb_kernel,
        out_shape=[
            jax.ShapeDtypeStruct((count, n, rank), q.dtype),
            jax.ShapeDtypeStruct((count, n, rope), q.dtype),
            jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        ],
        grid=(n * chunks + 1, count),
        input_output_aliases={4: 2},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )
    return call(q, kv, w_k, gain.astype(jnp.float32), pages, slot, *turn)


def expand(
    parts: Parts, w_v: Float[Array, "N Hv R"], dtype: jax.typing.DTypeLike, *, interpret: bool = False
) -> Float[Array, "T O"]:
    """Joins the splits of each query and takes the mean latent through its head's values.

    Args:
      parts: Of the rows' queries, [token, head] in this order; T is the tokens of all rows together.
      w_v: The values' half of `kv_b_proj`.
      dtype: Of the result.
      interpret: Whether JAX computes it without Triton.

    Returns:
      What `o_proj` takes, [T, N Hv].
    """
    (batch, splits, many, rank), (n, value, _) = parts.mixed.shape, w_v.shape
    groups, tokens = value // ROWS, many // n

    def expand_kernel(mixed_ref: Any, highest_ref: Any, total_ref: Any, w_ref: Any, out_ref: Any) -> None:
        head, group = pl.program_id(0) // groups, pl.program_id(0) % groups
        row, query = pl.program_id(1) // tokens, pl.program_id(1) % tokens * n + head

        def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            latent, highest, total = carry
            at = i * SPLITS + jnp.arange(SPLITS)
            there = at < splits
            place = jnp.where(there, at, 0)
            peaks = jnp.where(there, highest_ref[row, place, query], jnp.finfo(jnp.float32).min)
            rise = jnp.maximum(highest, jnp.max(peaks))
            share, shrink = jnp.where(there, jnp.exp(peaks - rise), 0), jnp.exp(highest - rise)
            part = jnp.sum(mixed_ref[row, place, query, :] * share[:, None], axis=0)
            return latent * shrink + part, rise, total * shrink + jnp.sum(total_ref[row, place, query] * share)

        start = jnp.zeros(rank, jnp.float32), jnp.float32(jnp.finfo(jnp.float32).min), jnp.float32(0)
        latent, _, total = jax.lax.fori_loop(0, -(-splits // SPLITS), step, start)
        latent = latent / jnp.where(total > 0, total, 1)
        weight = w_ref[head, pl.ds(group * ROWS, ROWS), :].astype(jnp.float32)
        result = jnp.sum(weight * latent[None, :], axis=1)
        out_ref[pl.program_id(1), pl.ds(head * value + group * ROWS, ROWS)] = result.astype(out_ref.dtype)

    call = pl.pallas_call(
        expand_kernel,
        out_shape=jax.ShapeDtypeStruct((batch * tokens, n * value), dtype),
        grid=(n * groups, batch * tokens),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )
    return call(*parts, w_v)
