"""Attention of a step of decoding to a paged cache on a GPU, written with Pallas for Triton: the cache is read once.

All heads share one key, whose first R numbers are the value too. So a program keeps the queries of 16 heads and walks
over a part of a row's pages with an online softmax (Dao et al. 2023, split over keys); parts are joined afterwards.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int


class Tile(NamedTuple):
    """What a program does; both sizes are powers of two, of 16 or more."""

    heads: int = 16
    tokens: int = 32
    """Keys that are read at a time, of one page."""
    warps: int = 4
    stages: int = 2
    programs: int = 396
    """Of all rows at most, where there are not more rows: an H100 runs three on each multiprocessor at once."""


TILE = Tile()
FEW = 32
"""Parts that are joined fast."""
WIDEST = 512
"""Numbers of a latent or rotary key: the trial is of narrow ones, and wider ones might not fit into shared memory."""
LOWEST = float(jnp.finfo(jnp.float32).min)


class Parts(NamedTuple):
    """What each split has found."""

    mixed: Float[Array, "B splits M R"]
    """Sum of exp(score - highest) times latent."""
    highest: Float[Array, "B splits M"]
    total: Float[Array, "B splits M"]
    """Sum of exp(score - highest)."""


def fits(queries: int, rank: int, rope: int, page: int, tile: Tile = TILE) -> bool:
    """Whether M queries a row and the pages are whole tiles, and the widths powers of two that a program holds."""
    whole = not queries % tile.heads and not page % tile.tokens
    return whole and all(16 <= n <= WIDEST and n & (n - 1) == 0 for n in (rank, rope))


def splits_of(rows: int, blocks: int, tile: Tile = TILE) -> int:
    """Parts of a row's keys: as many as fill the chip in one wave, and not so many that joining them takes longer.

    Args:
      rows: Of the batch, times groups of heads.
      blocks: Of keys, of a row at most.
      tile: How the keys are cut.

    Returns:
      At least 1, and no more than there are blocks.
    """
    return max(1, min(blocks, tile.programs // rows, max(FEW, blocks // 8)))


def attend_pages(
    q: Float[Array, "B M R"],
    q_rope: Float[Array, "B M H"],
    pages: Float[Array, "P page C"],
    table: Int[Array, "B n"],
    limit: Int[Array, "B M"],
    *,
    scale: float,
    tile: Tile = TILE,
    interpret: bool = False,
) -> Parts:
    """Softmax and sum of latents of each split of each row's keys.

    Args:
      q: Queries in the latent space, of M heads and tokens.
      q_rope: Rotary queries.
      pages: The pool; must fit.
      table: Pages of each row.
      limit: Highest place that each query sees; -1 sees none.
      scale: Factor on the scores.
      tile: How the keys are cut.
      interpret: Whether JAX computes it without Triton, as a test on a CPU does.

    Returns:
      The parts, in fp32; a split without keys has a total of 0.
    """
    (batch, many, rank), width, page = q.shape, q_rope.shape[2], pages.shape[1]
    groups, blocks = many // tile.heads, table.shape[1] * page // tile.tokens
    splits = splits_of(batch * groups, blocks, tile)
    last = jnp.max(limit, axis=1)

    def attend_kernel(
        q_ref: Any, rope_ref: Any, pool_ref: Any, table_ref: Any, limit_ref: Any, last_ref: Any, *out: Any
    ) -> None:
        own, turned, seen_to = q_ref[...], rope_ref[...], limit_ref[...]
        held = (last_ref[0] + tile.tokens) // tile.tokens
        each = (held + splits - 1) // splits
        start = pl.program_id(1) * each

        def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            mixed, highest, total = carry
            first = i * tile.tokens
            at = (table_ref[first // page], pl.ds(first % page, tile.tokens))
            latent, rope = pool_ref[*at, pl.ds(0, rank)], pool_ref[*at, pl.ds(rank, width)]
            scores = (_times(own, latent.T) + _times(turned, rope.T)) * scale
            seen = (first + jnp.arange(tile.tokens))[None, :] <= seen_to[:, None]
            scores = jnp.where(seen, scores, LOWEST)
            rise = jnp.maximum(highest, jnp.max(scores, axis=1))
            # Where a query sees nothing of this step, `rise` may still be the lowest number: then the weights are 0.
            weights = jnp.where(seen, jnp.exp(scores - rise[:, None]), 0)
            shrink = jnp.exp(highest - rise)
            part = _times(weights.astype(latent.dtype), latent)
            return mixed * shrink[:, None] + part, rise, total * shrink + jnp.sum(weights, axis=1)

        none = jnp.zeros(tile.heads, jnp.float32)
        carry = (jnp.zeros((tile.heads, rank), jnp.float32), none + LOWEST, none)
        found = jax.lax.fori_loop(start, jnp.minimum(start + each, held), step, carry)
        for ref, value in zip(out, found, strict=True):
            ref[...] = value

    def queries(n: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, tile.heads, n), lambda g, s, b: (b, g, 0))

    narrow = pl.BlockSpec((None, None, tile.heads), lambda g, s, b: (b, s, g))
    call = pl.pallas_call(
        attend_kernel,
        out_shape=[
            jax.ShapeDtypeStruct((batch, splits, many, rank), jnp.float32),
            *[jax.ShapeDtypeStruct((batch, splits, many), jnp.float32)] * 2,
        ],
        grid=(groups, splits, batch),
        in_specs=[
            queries(rank),
            queries(width),
            pl.BlockSpec(pages.shape, lambda g, s, b: (0, 0, 0)),
            pl.BlockSpec((None, table.shape[1]), lambda g, s, b: (b, 0)),
            pl.BlockSpec((None, tile.heads), lambda g, s, b: (b, g)),
            pl.BlockSpec((1,), lambda g, s, b: (b,)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, tile.heads, rank), lambda g, s, b: (b, s, g, 0)),
            narrow,
            narrow,
        ],
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
    )
    return Parts(*call(q, q_rope, pages, table, limit, last))


def join(parts: Parts) -> Float[Array, "B M R"]:
    """The mean latent of each query over all splits, in fp32; 0 of a query that sees nothing."""
    share = jnp.exp(parts.highest - jnp.max(parts.highest, axis=1, keepdims=True))
    total = jnp.sum(parts.total * share, axis=1)
    mixed = jnp.sum(parts.mixed * share[..., None], axis=1)
    return mixed / jnp.where(total > 0, total, 1)[..., None]


def _times(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
