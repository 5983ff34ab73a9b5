"""A few rows times a weight on a GPU, written with Pallas for Triton, with what stands before and after the product.

A token a step reads every weight once, and each launch costs as much as several megabytes. So the norm before a
product, the SwiGLU or the residual after it are in the product's own kernel: x / rms(x) * g times W^T is
(x * g) W^T / rms(x), and every program sums the squares of the row beside its own products.

Weights are read as words of 32 bits, two numbers of bf16 or four codes in each, and meet as many planes of a row: its
first, third, ... and its second, fourth, ... number, or every fourth. A row of the weight's own type is read so too.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from r1jax.ops.quantize import Quantized


class Tile(NamedTuple):
    """What a program does: it asks for whole rows of the weight at once, and then multiplies them."""

    words: int = 4096
    """Of all its rows, a power of two; over the number of rows of activations."""
    warps: int = 4


LONG = Tile(8192, 8)
"""For rows that a tile of the usual size would have one of."""
LEAST = 64
"""Numbers of a row are a multiple of this."""


def rows_of(wide: int, words: int, count: int, tile: Tile) -> int:
    """Rows of the weight that a program takes, a power of two that divides them all.

    Args:
      wide: Rows of the weight, or of its gate.
      words: Of such a row; of a gate and an up where they are paired.
      count: Rows of activations.
      tile: What a program does.

    Returns:
      At least 1.
    """
    most = max(1, tile.words // (words * (1 << (count - 1).bit_length())))
    return min(1 << (most.bit_length() - 1), wide & -wide)


def pieces_of(words: int) -> list[tuple[int, int]]:
    """First word and number of words of the parts of a row that are powers of two."""
    sizes = [1 << i for i in reversed(range(words.bit_length())) if words >> i & 1]
    return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def fits(x: Float[Array, "T J"], weight: Float[Array, "O I"] | Quantized) -> bool:
    """Whether the weight is floats of x's dtype or codes with one scale a row and none of a column, of such a width."""
    wide, deep = weight.shape
    if isinstance(weight, Quantized):
        plain = weight.scale.shape[-1] == 1 and weight.zero is None and weight.balance is None
        known = plain and weight.values.dtype == jnp.int8
    else:
        known = weight.dtype == x.dtype and weight.dtype in (jnp.bfloat16, jnp.float32)
        known = known and x.shape[1] * x.dtype.itemsize % 4 == 0  # whole words
    counted = wide * deep < 2**31  # by Triton's 32 bits
    return known and counted and wide % 8 == 0 and deep % LEAST == 0


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
    halves, values = 2 if paired else 1, weight.values if isinstance(weight, Quantized) else weight
    count, deep, wide = len(x), weight.shape[1], weight.shape[0] // halves
    per = 4 // values.dtype.itemsize
    tile = tile or (Tile() if halves * deep // per < Tile().words else LONG)
    words = _words(values)
    rows = rows_of(wide, halves * deep // per, count, tile)
    part = pl.BlockSpec((count, rows), lambda i: (0, i))
    arrays = [x if isinstance(weight, Quantized) else _words(x)]
    specs = [pl.BlockSpec((count, deep if isinstance(weight, Quantized) else deep // per), lambda i: (0, 0))]
    if gain is not None:
        arrays, specs = [*arrays, gain], [*specs, pl.BlockSpec((deep,), lambda i: (0,))]
    for half in range(halves):
        for array in (words, weight.scale[:, 0]) if isinstance(weight, Quantized) else (words,):
            arrays.append(array)
            specs.append(_rows(rows, array, half * (wide // rows)))
    if added is not None:
        arrays, specs = [*arrays, added], [*specs, part]

    def kernel(*refs: Any) -> None:
        given = iter(refs)
        x_ref, gain_ref = next(given), None if gain is None else next(given)
        weights = [(next(given), next(given) if isinstance(weight, Quantized) else None) for _ in range(halves)]
        added_ref, out_ref = None if added is None else next(given), next(given)
        sums, squares = _summed(x_ref, gain_ref, [w for w, _ in weights], per)
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
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=1),
        interpret=interpret,
    )
    return call(*arrays)


def _words(numbers: Float[Array, "R n"] | Int[Array, "R n"]) -> Int[Array, "R w"]:
    """The same bytes as words, for which the compiler does nothing."""
    per = 4 // numbers.dtype.itemsize
    parted = numbers.reshape(len(numbers), -1, per) if per > 1 else numbers
    return jax.lax.bitcast_convert_type(parted, jnp.int32)


def _rows(rows: int, array: Array, first: int) -> pl.BlockSpec:
    """The rows of a weight, or their scales, that a program takes."""
    if array.ndim == 1:
        return pl.BlockSpec((rows,), lambda i: (i + first,))
    return pl.BlockSpec((rows, array.shape[1]), lambda i: (i + first, 0))


def _summed(x_ref: Any, gain_ref: Any, weights: list[Any], per: int) -> tuple[list[list[Array]], list[Array]]:
    """Products of each row of x with the rows of each weight, [weight][t], and the sum of the squares of each row."""
    count, alike = x_ref.shape[0], x_ref.dtype == jnp.int32
    pieces = pieces_of(weights[0].shape[1])
    asked = [[w[:, pl.ds(*piece)] for piece in pieces] for w in weights]  # before anything waits for some of them
    sums = [[jnp.zeros(w.shape[0], jnp.float32)] * count for w in weights]
    squares = [jnp.float32(0)] * count
    for i, (start, size) in enumerate(pieces):
        numbers = [_numbers(own[i], per) for own in asked]
        places = [(start + jnp.arange(size)) * per + j for j in range(per)]
        gains = None if gain_ref is None else [gain_ref[at].astype(jnp.float32) for at in places]
        for t in range(count):
            if alike:
                planes = _numbers(x_ref[t, pl.ds(start, size)], per)
            else:
                planes = [x_ref[t, at].astype(jnp.float32) for at in places]
            if gains is not None:
                squares[t] += jnp.sum(sum(plane * plane for plane in planes))
                planes = [plane * gain for plane, gain in zip(planes, gains, strict=True)]
            for weight, total in zip(numbers, sums, strict=True):
                lanes = sum(w * plane[None, :] for w, plane in zip(weight, planes, strict=True))
                total[t] += jnp.sum(lanes, axis=1)
    return sums, squares


def _numbers(words: Int[Array, "*R w"], per: int) -> list[Float[Array, "*R w"]]:
    """What words hold, in fp32, the first number of each word first: one of fp32, two of bf16, or four codes."""
    if per == 1:
        return [jax.lax.bitcast_convert_type(words, jnp.float32)]
    if per == 2:  # bf16 is the upper half of fp32
        halves = jax.lax.shift_left(words, jnp.full_like(words, 16)), words & jnp.int32(-65536)
        return [jax.lax.bitcast_convert_type(half, jnp.float32) for half in halves]
    # A code and 128 in the last bits of 2^23 make a number of fp32, which costs less than to convert an integer.
    raised = words ^ jnp.int32(-2139062144)  # 128 more in each byte
    parts = [jax.lax.shift_right_logical(raised, jnp.full_like(words, 8 * i)) if i else raised for i in range(4)]
    parts = [(part & jnp.int32(255) if i < 3 else part) | jnp.int32(0x4B000000) for i, part in enumerate(parts)]
    return [jax.lax.bitcast_convert_type(part, jnp.float32) - jnp.float32(2**23 + 128) for part in parts]
