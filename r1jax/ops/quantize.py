"""Numbers in 8 or 4 bits with one scale a row or block: how they are rounded, packed and read back.

A row is the last axis, along which products contract: weights are [out, in]. The cast is clipped before it is made:
what an integer cast does with 128 differs from compiler to compiler. Scales of weights are bf16, as they are stored.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt32

Kind = Literal["int8", "int4", "fp8", "affine8"]
"""int8, int4, fp8 (e4m3): symmetric, zero is 0. affine8: scale = (max - min) / 255, round((v - min) / scale), which is
often called symmetric and is not: weights only, and products with them are of floats."""

BOUND = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
"""Largest number of each kind; -128 and -8 are not used, so that a row and its negative round alike."""
TYPE = {"int8": jnp.int8, "int4": jnp.int8, "fp8": jnp.float8_e4m3fn, "affine8": jnp.uint8}
"""In what the numbers of each kind are held; int4 in whole bytes, since not every compiler multiplies less."""
FLOOR = 2.0**-100
"""Least scale: of zeros it is no division by zero, and products of two such scales are still numbers of fp32."""


class Quantized(NamedTuple):
    """Narrow numbers and what they stand for: values * scale (+ zero) / balance, row by row or block by block."""

    values: Array
    """Of the shape of the original, int8, int4, uint8 or fp8."""
    scale: Float[Array, "*rows blocks"]
    """One block is the whole row; otherwise all blocks but the last are equally long."""
    zero: Float[Array, "*rows blocks"] | None = None
    """What 0 stands for, of affine kinds."""
    balance: Float[Array, "1 I"] | None = None
    """Powers of two by which each column of a weight was multiplied before it was rounded, and its input is divided."""
    span: Float[Array, "..."] | None = None
    """Largest magnitude of the inputs of a weight, divided by their balance: [1, 1], or while a range is not yet known
    that of each of their blocks; None takes that of each."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the original."""
        return self.values.shape


def quantize(
    x: Float[Array, "*rows I"],
    kind: Kind,
    *,
    block: int | None = None,
    scale_dtype: DTypeLike = jnp.float32,
    bits: UInt32[Array, "*rows I"] | None = None,
    span: Float[Array, "..."] | None = None,
) -> Quantized:
    """Rounds to the nearest number of a kind (ties to even), or at random to one of the two neighbours.

    Args:
      x: Numbers.
      kind: What they become.
      block: Numbers that share a scale; None is the whole row.
      scale_dtype: What the scale is rounded to before it is used.
      bits: Random; with them rounding is stochastic, and right on average. Integers only.
      span: Largest magnitude that counts, of all rows or of each block; what is beyond it is clipped. Symmetric kinds
        only.

    Returns:
      Numbers and scales.
    """
    wide = _blocks(x.astype(jnp.float32), block)
    zero = None
    if kind == "affine8":
        zero = _as_stored(jnp.min(wide, axis=-1), scale_dtype)
        span = jnp.max(wide, axis=-1) - zero.astype(jnp.float32)
        scale = _as_stored(jnp.maximum(span * np.float32(1 / 255), FLOOR), scale_dtype)
        q = jnp.clip(jnp.round((wide - _column(zero)) / _column(scale)), 0, 255)
        return Quantized(_row(q, x.shape[-1]).astype(jnp.uint8), scale, zero)
    # Multiplied, not divided: of x / 127 compilers make either, and they differ in the last bit.
    largest = _largest(wide) if span is None else jnp.broadcast_to(span, wide.shape[:-1])
    scale = _as_stored(jnp.maximum(largest * np.float32(1 / BOUND[kind]), FLOOR), scale_dtype)
    q = wide / _column(scale)
    if kind != "fp8":
        unit = None if bits is None else _blocks((bits >> 8).astype(jnp.float32) * np.float32(2**-24), block)
        q = jnp.round(q) if unit is None else jnp.floor(q + unit)
    q = jnp.clip(q, -BOUND[kind], BOUND[kind])
    return Quantized(_row(q, x.shape[-1]).astype(TYPE[kind]), scale)


def _as_stored(x: Float[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """Rounds fp32 to what is stored: a cast to bf16 and back XLA may leave out of a program, this it may not."""
    if dtype == jnp.float32:
        return x
    kept = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, kept.nexp, kept.nmant).astype(dtype)


def magnitudes(x: Float[Array, "*rows I"], block: int | None) -> Float[Array, "*rows blocks"]:
    """The largest magnitude of each block, in fp32; infinite where one of its numbers is not finite."""
    return _largest(_blocks(x.astype(jnp.float32), block))


def _largest(wide: Array) -> Array:
    """Of the last axis. NaN counts as infinite, since XLA's maximum of a large array passes over it on a CPU."""
    return jnp.max(jnp.where(jnp.isnan(wide), jnp.inf, jnp.abs(wide)), axis=-1)


def dequantize(q: Quantized, dtype: DTypeLike = jnp.float32) -> Float[Array, "*rows I"]:
    """What the numbers stand for.

    Args:
      q: Numbers and scales.
      dtype: Of the result.

    Returns:
      Array of the original's shape.
    """
    length = q.values.shape[-1]
    wide = _blocks(q.values.astype(jnp.float32), block_of(q)) * _column(q.scale)
    if q.zero is not None:
        wide = wide + _column(q.zero)
    plain = _row(wide, length)
    return (plain if q.balance is None else plain / q.balance.astype(jnp.float32)).astype(dtype)


def block_of(q: Quantized) -> int | None:
    """Numbers that share a scale; None is the whole row."""
    return None if q.scale.shape[-1] == 1 else block_length(q.values.shape[-1], q.scale.shape[-1])


def block_length(length: int, blocks: int) -> int:
    """Length of all blocks but the last; `quantize` makes it even out where it does not divide the row."""
    return -(-length // blocks)


def pack_int4(values: np.ndarray) -> np.ndarray:
    """Puts two numbers of -8 to 7 into each byte, the first into the lower half.

    Args:
      values: Integers of any shape.

    Returns:
      uint8, flat; of an odd count the last upper half is 0.
    """
    flat = np.asarray(values, np.int8).reshape(-1).view(np.uint8) & 0xF
    flat = np.pad(flat, (0, flat.size % 2))
    return flat[::2] | (flat[1::2] << 4)


def unpack_int4(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Undoes `pack_int4`.

    Args:
      packed: Bytes.
      shape: Of the numbers.

    Returns:
      int8.
    """
    halves = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(-1)[: int(np.prod(shape))]
    return ((halves ^ 8).astype(np.int8) - 8).reshape(shape)


def quantize_reference(x: np.ndarray, kind: Kind, *, block: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """`quantize` of the symmetric integers in float64, row by row and block by block.

    Args:
      x: Numbers.
      kind: int8 or int4.
      block: Numbers that share a scale.

    Returns:
      Integers and scales.
    """
    rows, bound = np.asarray(x, np.float64).reshape(-1, x.shape[-1]), BOUND[kind]
    count = 1 if block is None else -(-x.shape[-1] // block)
    step = block_length(x.shape[-1], count)
    values, scales = np.zeros(rows.shape), np.zeros((len(rows), count))
    for i, row in enumerate(rows):
        for j in range(count):
            part = slice(j * step, (j + 1) * step)
            scales[i, j] = max(np.abs(row[part]).max() / bound, FLOOR)
            values[i, part] = np.clip(np.round(row[part] / scales[i, j]), -bound, bound)
    return values.reshape(x.shape), scales.reshape(*x.shape[:-1], count)


def _blocks(x: Array, block: int | None) -> Array:
    """[*rows, I] as [*rows, blocks, b]; zeros fill the last block."""
    length = x.shape[-1]
    count = 1 if block is None else -(-length // block)
    step = block_length(length, count)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count * step - length)]) if count * step > length else x
    return x.reshape(*x.shape[:-1], count, step)


def _row(blocks: Array, length: int) -> Array:
    """Undoes `_blocks`."""
    return blocks.reshape(*blocks.shape[:-2], -1)[..., :length]


def _column(x: Array) -> Array:
    return x.astype(jnp.float32)[..., None]
