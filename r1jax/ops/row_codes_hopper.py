"""Rows of activations become int8 or fp8 codes on Hopper GPUs, in Pallas for Mosaic: each number is read once.

XLA reads a row twice to round it, and what SwiGLU multiplies by its last weight it writes out for that. Here a
warpgroup holds a row in registers, finds its largest number and writes codes; of silu(gate) * up it reads both factors.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from r1jax.ops.quantize import BOUND, FLOOR, TYPE
from r1jax.ops.self_test import multiprocessors

THREADS = 128
"""Of a warpgroup."""
VECTOR = 8
"""Numbers that a thread reads at a time: 16 bytes."""
LONGEST_ROW = 16384
"""Numbers that a warpgroup holds in registers."""
SHARED, REGISTERS = 220 * 1024, 65536 // THREADS
"""Bytes of shared memory, and registers for a thread of each, that a multiprocessor's thread blocks divide."""
WITHIN = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
"""Such a copy is of one piece, and not of parts of 256 numbers."""
HALFWAY = np.float32(1.5 * 2**23)
"""Added to a float below 2^22 it leaves the nearest integer, ties to even, in the lower bits."""
GATED = 2
"""Stages of the kernel of two factors: buffers of shared memory into which rows are copied while those before are
rounded. Of 0, each row has a thread block, which reads it into registers: faster where a row is of one array."""


def fits_row(length: int) -> bool:
    """Whether a warpgroup's registers hold a row, and each thread has as many numbers of it."""
    return length % (THREADS * VECTOR) == 0 and length <= LONGEST_ROW


@functools.partial(jax.jit, static_argnames="kind")  # lowered once for all products of a size
def row_codes(x: Float[Array, "M I"], kind: Literal["int8", "fp8"]) -> tuple[Array, Float[Array, " M"]]:
    """`quantize` of rows.

    Args:
      x: bf16; a row must fit.
      kind: What they become.

    Returns:
      Codes [M, I] and scales, fp32.
    """
    return _codes(lambda x: x, (x,), kind, stages=0)


@functools.partial(jax.jit, static_argnames=("kind", "stages"))
def gated_codes(
    gate: Float[Array, "M I"], up: Float[Array, "M I"], kind: Literal["int8", "fp8"], *, stages: int = GATED
) -> tuple[Array, Float[Array, " M"]]:
    """`quantize` of silu(gate) * up, which is formed in fp32 and rounded to bf16, but never written.

    Args:
      gate: bf16; a row must fit.
      up: The same.
      kind: What the products become.
      stages: As of `GATED`.

    Returns:
      Codes [M, I] and scales, fp32.
    """

    def form(gate: Array, up: Array) -> Array:
        # Hopper has an instruction for reciprocal roots; a division would be several.
        root = jax.lax.rsqrt(1 + jnp.exp(-gate))
        return (gate * (root * root) * up).astype(jnp.bfloat16).astype(jnp.float32)

    return _codes(form, (gate, up), kind, stages)


def _codes(
    form: Callable[..., Array], arrays: tuple[Array, ...], kind: Literal["int8", "fp8"], stages: int
) -> tuple[Array, Float[Array, " M"]]:
    """Codes and scales of what is formed, in fp32, of the same row of each array."""
    rows, length = arrays[0].shape
    layout, count = plgpu.Layout.WG_STRIDED((length,), vec_size=VECTOR), len(arrays)

    def read(refs: list[Any]) -> tuple[Array, Array]:
        """What is formed, and its scale, which no thread has before all have read."""
        row = form(*(plgpu.load(ref, layout=layout).astype(jnp.float32) for ref in refs))
        return row, jnp.maximum(jnp.max(jnp.abs(row)) * np.float32(1 / BOUND[kind]), np.float32(FLOOR))

    def write(at: Array, row: Array, scale: Array, codes: Any, scales: Any) -> None:
        values = row / scale
        # Nothing is clipped: the bound is exceeded only by what rounding takes away, or in rows of no finite scale.
        if kind == "int8":
            values = jax.lax.bitcast_convert_type(values + HALFWAY, jnp.int32)
        codes[at], scales[at] = values.astype(TYPE[kind]), scale

    def alone(*refs: Any) -> None:
        at = jax.lax.axis_index("block")
        write(at, *read([x.at[at] for x in refs[:count]]), *refs[count:])

    def in_turn(*refs: Any) -> None:
        given, out, rings, filled = refs[:count], refs[count : count + 2], refs[count + 2 : -1], refs[-1]
        block = jax.lax.axis_index("block")
        mine = (rows - block + blocks - 1) // blocks

        def copy(turn: Array) -> None:
            slot = jax.lax.rem(turn, stages)
            for x, ring in zip(given, rings, strict=True):
                row = x.at[block + turn * blocks]
                plgpu.copy_gmem_to_smem(row, ring.at[slot], filled.at[slot], oob_mode=WITHIN)

        def one(turn: Array, _: None) -> None:
            slot = jax.lax.rem(turn, stages)
            plgpu.barrier_wait(filled.at[slot])
            row, scale = read([ring.at[slot] for ring in rings])
            pl.when(turn + stages < mine)(lambda: copy(turn + stages))
            write(block + turn * blocks, row, scale, *out)

        for turn in range(stages):
            pl.when(turn < mine)(functools.partial(copy, jnp.int32(turn)))
        jax.lax.fori_loop(0, mine, one, None)

    blocks = multiprocessors() * _resident(length, [x.dtype.itemsize for x in arrays], stages) if stages else rows
    rings = [plgpu.SMEM((stages, length), x.dtype) for x in arrays]
    return plgpu.kernel(
        in_turn if stages else alone,
        out_type=(jax.ShapeDtypeStruct((rows, length), TYPE[kind]), jax.ShapeDtypeStruct((rows,), jnp.float32)),
        scratch_types=[*rings, plgpu.Barrier(num_arrivals=count, num_barriers=stages)] if stages else [],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=1,
        thread_name="wg",
        # Approximate are exponentials and roots, by some 2^-22: those of numbers that bf16 then rounds by 2^-9.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True),
    )(*arrays)


def _resident(length: int, sizes: list[int], stages: int) -> int:
    """Thread blocks that a multiprocessor holds: more would begin when others have ended, and have as many rows."""
    registers = 32 + len(sizes) * length // THREADS  # two of the compiler's for a number of SwiGLU's
    return max(1, min(SHARED // (stages * sum(sizes) * length), REGISTERS // registers))
