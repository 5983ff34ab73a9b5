"""A few rows times a weight on a GPU, written with Pallas for Triton, with what stands before and after the product.

A token a step reads every weight once, and each launch costs as much as several megabytes. So the norm before a
product, the SwiGLU or the residual after it are in the product's own kernel: x / rms(x) * g times W^T is
(x * g) W^T / rms(x), and every program sums the squares of the row beside its own products.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from r1jax.ops.quantize import Quantized


class Tile(NamedTuple):
    """What a program does; rows and depth are powers of two."""

    rows: int = 4
    """Of the weight; more where rows are narrow."""
    depth: int = 1024
    """Numbers of each row that are read at a time, over the number of rows of activations."""
    ahead: int = 2
    """Reads that are under way before the first is needed."""
    warps: int = 4


TILES = {1: Tile(2, 1024, 2, 2), 2: Tile()}
"""By the bytes of a number of the weight."""
LEAST = 64
"""Numbers of a row that a program reads at a time at least."""


def size_of(width: int, count: int, tile: Tile) -> tuple[int, int, list[int]]:
    """Rows of the weight, numbers of each that are read at a time, and in what powers of two the rest is read."""
    most = max(LEAST, tile.depth // (1 << (count - 1).bit_length()))
    depth = min(most, 1 << (width.bit_length() - 1))
    rest = width % depth
    return tile.rows * min(4, most // depth), depth, [n for n in (depth >> i for i in range(1, 16)) if rest & n]


def tile_of(weight: Float[Array, "O I"] | Quantized) -> Tile:
    """The tile of a kind of weight."""
    return TILES[1 if isinstance(weight, Quantized) else 2]


def fits(x: Float[Array, "T J"], weight: Float[Array, "O I"] | Quantized, tile: Tile | None = None) -> bool:
    """Whether the weight is whole tiles of rows, of floats or of codes with one scale a row and none of a column."""
    if isinstance(weight, Quantized):
        plain = weight.scale.shape[-1] == 1 and weight.zero is None and weight.balance is None
        known = plain and weight.values.dtype == jnp.int8
    else:
        known = weight.dtype == x.dtype
    wide, deep = weight.shape
    rows, _, _ = size_of(deep, len(x), tile or tile_of(weight))
    counted = wide * deep < 2**31  # by Triton's 32 bits
    return known and counted and wide % (2 * rows) == 0 and deep % LEAST == 0


def rows_times_weight(
    x: Float[Array, "T J"],
    weight: Float[Array, "O I"] | Quantized,
    *,
    gain: Float[Array, " I"] | None = None,
    eps: float = 0.0,
    added: Float[Array, "T O"] | None = None,
    paired: bool = False,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Float[Array, "T F"]:
    """`row_product`, whose arguments these are, in one launch.

    Args:
      x: Few rows, of which the first I numbers count.
      weight: Must fit.
      gain: Of the norm before the product.
      eps: Of the norm.
      added: To the result.
      paired: Whether the weight is gate above up, of a SwiGLU after the product.
      tile: How the weight is cut; None takes that of its kind.
      interpret: Whether JAX computes it without Triton, as a test on a CPU does.

    Returns:
      Array of x's dtype, summed in fp32; F is O, or half of it where it is paired.
    """
    tile = tile or tile_of(weight)
    count, deep, wide = len(x), weight.shape[1], weight.shape[0] // (2 if paired else 1)
    rows, depth, rest = size_of(deep, count, tile)
    ahead = max(n for n in range(1, tile.ahead + 1) if deep // depth % n == 0)
    whole = pl.BlockSpec((count, deep), lambda i: (0, 0))
    part = pl.BlockSpec((count, rows), lambda i: (0, i))
    arrays, specs = [x], [whole]
    if gain is not None:
        arrays, specs = [*arrays, gain], [*specs, pl.BlockSpec((deep,), lambda i: (0,))]
    halves = 2 if paired else 1
    for half in range(halves):
        first = half * (wide // rows)
        for array in (weight.values, weight.scale[:, 0]) if isinstance(weight, Quantized) else (weight,):
            arrays.append(array)
            specs.append(_rows(rows, array, first))
    if added is not None:
        arrays, specs = [*arrays, added], [*specs, part]

    def kernel(*refs: Any) -> None:
        held = iter(refs)
        x_ref, gain_ref = next(held), None if gain is None else next(held)
        weights = [(next(held), next(held) if isinstance(weight, Quantized) else None) for _ in range(halves)]
        added_ref, out_ref = None if added is None else next(held), next(held)
        sums, squares = _summed(x_ref, gain_ref, [w for w, _ in weights], depth, ahead, rest)
        for t in range(count):
            shrink = 1.0 if gain is None else jax.lax.rsqrt(squares[t] / deep + eps)
            parts = [
                own[t] * shrink * (1.0 if scale is None else scale[...].astype(jnp.float32))
                for own, (_, scale) in zip(sums, weights, strict=True)
            ]
            y = parts[0] * jax.nn.sigmoid(parts[0]) * parts[1] if paired else parts[0]
            y = y if added_ref is None else y + added_ref[t, :].astype(jnp.float32)
            out_ref[t, :] = y.astype(out_ref.dtype)

    kernel.__name__ = f"rows_times_{weight.shape[0]}x{deep}"  # as a profile shows it
    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((count, wide), x.dtype),
        grid=(wide // rows,),
        in_specs=specs,
        out_specs=part,
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=2),
        interpret=interpret,
    )
    return call(*arrays)


def _rows(rows: int, array: Array, first: int) -> pl.BlockSpec:
    """The rows of a weight, or their scales, that a program takes."""
    if array.ndim == 1:
        return pl.BlockSpec((rows,), lambda i: (i + first,))
    return pl.BlockSpec((rows, array.shape[1]), lambda i: (i + first, 0))


def _summed(
    x_ref: Any, gain_ref: Any, weights: list[Any], depth: int, ahead: int, rest: list[int]
) -> tuple[list[list[Array]], list[Array]]:
    """Products of each row of x with the rows of each weight, [weight][t], and the sum of the squares of each row of x.

    A program keeps as many sums for each as it reads numbers at a time: threads exchange nothing before the end.
    """
    count, deep = x_ref.shape
    rows = weights[0].shape[0]

    def none(depth: int) -> tuple[Any, Any]:
        wide, narrow = (jnp.zeros(shape, jnp.float32) for shape in ((rows, depth), (depth,)))
        return [[wide] * count for _ in weights], [narrow] * count

    def add(carry: tuple[Any, Any], places: list[Any]) -> tuple[Any, Any]:
        sums, squares = [list(own) for own in carry[0]], list(carry[1])
        read = [[w[:, at] for w in weights] for at in places]
        for at, tiles in zip(places, read, strict=True):
            gain = None if gain_ref is None else gain_ref[at].astype(jnp.float32)
            for t in range(count):
                row = x_ref[t, at].astype(jnp.float32)
                if gain is not None:
                    squares[t] = squares[t] + row * row
                    row = row * gain
                for j, w in enumerate(tiles):
                    sums[j][t] = sums[j][t] + w.astype(jnp.float32) * row[None, :]
        return [list(own) for own in sums], squares

    def step(k: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        return add(carry, [pl.ds((k * ahead + n) * depth, depth) for n in range(ahead)])

    parts = [jax.lax.fori_loop(0, deep // (depth * ahead), step, none(depth))]
    reached = deep - sum(rest)
    for size in rest:
        parts.append(add(none(size), [pl.ds(reached, size)]))
        reached += size
    # Each part is summed by itself, over numbers of its own length.
    sums, squares = jax.tree.map(lambda *own: sum(jnp.sum(x, axis=-1) for x in own), *parts)
    return sums, squares
