"""Routed experts of a few tokens on a GPU, written with Pallas for Triton: only what was chosen is read.

Nothing is sorted and no weight is copied: a program looks up which expert its choice has and reads rows of it in place.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

WARPS = 4
TILE = 4096
"""Numbers of a weight that a program reads at a time."""
MOST = 1024
"""Numbers of a row among them."""
LEAST = 64


def tile_of(width: int, weights: int) -> tuple[int, int]:
    """Rows and numbers of each that a program reads at a time of so many weights; the width is whole tiles."""
    depth = min(MOST, width & -width)
    numbers = max(TILE // (1 << (weights - 1).bit_length()), 8 * 32 * WARPS)  # 16 bytes a thread at least
    return max(1, numbers // depth), depth


def fits(choices: int, gate_up: Float[Array, "E F2 D"], down: Float[Array, "E D F"]) -> bool:
    """Whether both weights are whole tiles, where each token has so many choices, and 32 bits count their numbers."""
    (_, both, wide), inner = gate_up.shape, down.shape[2]
    first, second = tile_of(wide, 2), tile_of(inner, choices)
    deep = first[1] >= LEAST and second[1] >= LEAST
    counted = gate_up.size < 2**31
    return counted and deep and not both // 2 % first[0] and not wide % second[0]


def gate_and_up(
    x: Float[Array, "T D"], experts: Int[Array, "T K"], gate_up: Float[Array, "E F2 D"], *, interpret: bool = False
) -> Float[Array, "T K F"]:
    """SwiGLU's inner half of every choice, silu(gate) * up.

    Args:
      x: Tokens.
      experts: Choices.
      gate_up: Stacked weights, gate above up; must fit.
      interpret: Whether JAX computes it without Triton, as a test on a CPU does.

    Returns:
      Array of x's dtype.
    """
    (tokens, many), (_, both, wide) = experts.shape, gate_up.shape
    inner, (rows, depth) = both // 2, tile_of(wide, 2)

    def gate_up_kernel(x_ref: Any, experts_ref: Any, w_ref: Any, out_ref: Any) -> None:
        part, choice = pl.program_id(0), pl.program_id(1)
        token, k = choice // many, choice % many
        expert = experts_ref[token, k]

        def step(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            at = pl.ds(i * depth, depth)
            read = [w_ref[expert, pl.ds(part * rows + half * inner, rows), at] for half in range(2)]
            row = x_ref[token, at].astype(jnp.float32)[None, :]
            gate, up = (own + w.astype(jnp.float32) * row for own, w in zip(sums, read, strict=True))
            return gate, up

        none = jnp.zeros((rows, depth), jnp.float32)
        gate, up = (jnp.sum(own, axis=1) for own in jax.lax.fori_loop(0, wide // depth, step, (none, none)))
        hidden = gate * jax.nn.sigmoid(gate) * up
        out_ref[token, k, pl.ds(part * rows, rows)] = hidden.astype(out_ref.dtype)

    call = pl.pallas_call(
        gate_up_kernel,
        out_shape=jax.ShapeDtypeStruct((tokens, many, inner), x.dtype),
        grid=(inner // rows, tokens * many),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=2),
        interpret=interpret,
    )
    return call(x, experts, gate_up)


def weigh_down(
    hidden: Float[Array, "T K F"],
    experts: Int[Array, "T K"],
    shares: Float[Array, "T K"],
    down: Float[Array, "E D F"],
    added: Float[Array, "T D"],
    *,
    interpret: bool = False,
) -> Float[Array, "T D"]:
    """Sum of each token's choices through their experts' last weight, times their shares, and what is added.

    Args:
      hidden: From `gate_and_up`.
      experts: Choices.
      shares: What each choice weighs, fp32.
      down: Stacked weights; must fit.
      added: Residual stream and shared experts.
      interpret: As there.

    Returns:
      Array of hidden's dtype, summed in fp32.
    """
    (tokens, many, inner), wide = hidden.shape, down.shape[1]
    rows, depth = tile_of(inner, many)

    def down_kernel(h_ref: Any, experts_ref: Any, shares_ref: Any, w_ref: Any, added_ref: Any, out_ref: Any) -> None:
        token, own_rows = pl.program_id(1), pl.ds(pl.program_id(0) * rows, rows)
        chosen = [(experts_ref[token, k], shares_ref[token, k]) for k in range(many)]

        def step(i: Array, sums: Array) -> Array:
            at = pl.ds(i * depth, depth)
            read = [w_ref[expert, own_rows, at] for expert, _ in chosen]  # all are under way before one is needed
            for k, (weight, (_, share)) in enumerate(zip(read, chosen, strict=True)):
                row = h_ref[token, k, at].astype(jnp.float32) * share
                sums = sums + weight.astype(jnp.float32) * row[None, :]
            return sums

        sums = jax.lax.fori_loop(0, inner // depth, step, jnp.zeros((rows, depth), jnp.float32))
        result = jnp.sum(sums, axis=1) + added_ref[token, own_rows].astype(jnp.float32)
        out_ref[token, own_rows] = result.astype(out_ref.dtype)

    call = pl.pallas_call(
        down_kernel,
        out_shape=jax.ShapeDtypeStruct((tokens, wide), hidden.dtype),
        grid=(wide // rows, tokens),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=2),
        interpret=interpret,
    )
    return call(hidden, experts, shares, down, added)
