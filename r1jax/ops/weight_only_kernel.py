"""A row times a weight of codes on a GPU, written with Pallas for Triton: each byte of the weight is read once.

A program takes a few rows of the weight and keeps as many sums for each as it reads numbers at a time, so that threads
exchange nothing before the end.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from r1jax.ops.quantize import Quantized


class Tile(NamedTuple):
    """What a program does; both lengths are powers of two."""

    rows: int = 4
    depth: int = 1024
    """Numbers of each row that are read at a time."""
    warps: int = 4


TILE = Tile()
"""The fastest of those that were tried on an H200 (benchmarks/low_bits.py)."""


def fits(codes: Quantized, tile: Tile = TILE) -> bool:
    """Whether the weight is whole tiles, with one scale a row and none of a column."""
    rows, length = codes.shape[-2:]
    plain = codes.scale.shape[-1] == 1 and codes.zero is None and codes.balance is None
    return plain and rows % tile.rows == 0 and length % tile.depth == 0


def row_times_codes(
    x: Float[Array, " I"], codes: Quantized, *, tile: Tile = TILE, interpret: bool = False
) -> Float[Array, " O"]:
    """W x, summed in fp32.

    Args:
      x: A row of activations.
      codes: [O, I]; must fit.
      tile: How the weight is cut.
      interpret: Whether JAX computes it without Triton, as a test on a CPU does.

    Returns:
      Array of x's dtype.
    """
    wide, deep = codes.shape

    def kernel(x_ref: Any, w_ref: Any, scale_ref: Any, out_ref: Any) -> None:
        def step(k: Array, sums: Array) -> Array:
            at = pl.ds(k * tile.depth, tile.depth)
            return sums + w_ref[:, at].astype(jnp.float32) * x_ref[at].astype(jnp.float32)[None, :]

        none = jnp.zeros((tile.rows, tile.depth), jnp.float32)
        sums = jax.lax.fori_loop(0, deep // tile.depth, step, none)
        out_ref[...] = (jnp.sum(sums, axis=1) * scale_ref[...].astype(jnp.float32)).astype(out_ref.dtype)

    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((wide,), x.dtype),
        grid=(wide // tile.rows,),
        in_specs=[
            pl.BlockSpec((deep,), lambda i: (0,)),
            pl.BlockSpec((tile.rows, deep), lambda i: (i, 0)),
            pl.BlockSpec((tile.rows,), lambda i: (i,)),
        ],
        out_specs=pl.BlockSpec((tile.rows,), lambda i: (i,)),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=2),
        interpret=interpret,
    )
    return call(x, codes.values, codes.scale[:, 0])
