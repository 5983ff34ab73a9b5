"""Products of int8 or fp8 codes on Hopper GPUs, in Pallas for Mosaic: sums are scaled before they leave the chip.

XLA writes the sums of int8 products out in 32 bits and reads them again to scale them. Here one warpgroup of a
persistent kernel copies tiles of both operands into a ring of shared memory while two others multiply them from there,
scale what they have summed by row and by column, and write it in the result's type.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from r1jax.ops.self_test import multiprocessors

DEPTH = 128
"""Codes of one step along the contracted axis: what the widest swizzle of shared memory holds."""
CELL = 64
"""Rows and columns of the result that are written at a time."""


class Tiling(NamedTuple):
    """How a product is cut; what a thread block holds must fit into 227 KiB of shared memory."""

    rows: int = 128
    """Of the result that a thread block sums at a time, half by each of its multiplying warpgroups."""
    columns: int = 256
    stages: int = 4
    """Buffers of the ring."""
    band: int = 8
    """Tiles along `along` that are done before the next line of tiles."""
    along: int = 1
    """The axis of the result whose tiles follow one another."""
    cluster: int = 2
    """Thread blocks, one below the other, that read each part of the weight together."""
    cells: int = 2
    """Buffers of what a warpgroup writes."""


TILING = Tiling()


def fits(rows: int, columns: int, depth: int, tiling: Tiling = TILING) -> bool:
    """Whether a product [rows, depth] x [columns, depth] is of whole cells and steps, and occupies the device."""
    whole = rows % CELL == columns % CELL == depth % DEPTH == 0
    busy = rows > tiling.rows * (tiling.cluster - 1)  # of a cluster, every block has rows
    return whole and busy and pl.cdiv(rows, tiling.rows) * pl.cdiv(columns, tiling.columns) >= multiprocessors()


@functools.partial(jax.jit, static_argnames=("dtype", "tiling"))
def scaled_product(
    x: Array,
    w: Array,
    x_scale: Float[Array, " M"],
    w_scale: Float[Array, " N"],
    dtype: DTypeLike,
    *,
    tiling: Tiling = TILING,
) -> Float[Array, "M N"]:
    """X w^T of codes, times the scales of their rows.

    Args:
      x: Codes [M, K], int8 or e4m3; must fit.
      w: The same [N, K].
      x_scale: fp32.
      w_scale: fp32 or bf16.
      dtype: Of the result, bf16 or fp16.
      tiling: How it is cut.

    Returns:
      (sum * x_scale) * w_scale, summed in int32, or of fp8 as the tensor cores sum (fp32 of about 14 bits).
    """
    rows, columns, stages, band, along, cluster, buffers = tiling
    height, width, steps = x.shape[0], w.shape[0], x.shape[1] // DEPTH
    grid = (pl.cdiv(height, rows * cluster), pl.cdiv(width, columns))
    groups = multiprocessors() // cluster
    part = (rows // 2, columns)
    wide = jnp.int32 if x.dtype == jnp.int8 else jnp.float32

    def body(x, w, x_scale, w_scale, out, x_ring, w_ring, x_scales, w_scales, cells, filled, emptied, ready, used):
        group, member, thread = (jax.lax.axis_index(name) for name in ("group", "member", "wg"))
        mine = (grid[0] * grid[1] - group + groups - 1) // groups

        def locate(turn: Array) -> tuple[Array, Array]:
            i, j = plgpu.planar_snake(group + turn * groups, grid, along, band)
            return (i * cluster + member) * rows, j * columns

        def copy() -> None:
            plgpu.set_max_registers(40, action="decrease")

            def one(turn: Array, begun: Array) -> Array:
                top, start = locate(turn)

                def step(k: Array, _: None) -> None:
                    slot, deep = jax.lax.rem(begun + k, stages), pl.ds(k * DEPTH, DEPTH)
                    plgpu.barrier_wait(emptied.at[slot])
                    plgpu.copy_gmem_to_smem(x.at[pl.ds(top, rows), deep], x_ring.at[slot], filled.at[slot])
                    plgpu.copy_gmem_to_smem(
                        w.at[pl.ds(start, columns), deep],
                        w_ring.at[slot],
                        filled.at[slot],
                        collective_axes="member" if cluster > 1 else None,
                    )

                jax.lax.fori_loop(0, steps, step, None)
                plgpu.barrier_wait(used)  # not before, so that the first steps of a tile need not wait for the last one
                plgpu.copy_gmem_to_smem(x_scale.at[pl.ds(top, rows)], x_scales, ready)
                plgpu.copy_gmem_to_smem(w_scale.at[pl.ds(start, columns)], w_scales, ready)
                return begun + steps

            jax.lax.fori_loop(0, mine, one, jnp.int32(0))
            for slot in range(stages):  # a barrier must not be left before its last phase
                plgpu.barrier_wait(emptied.at[slot])
            plgpu.barrier_wait(used)

        def multiply() -> None:
            plgpu.set_max_registers(232, action="increase")
            for slot in range(stages):
                plgpu.barrier_arrive(emptied.at[slot])
            plgpu.barrier_arrive(used)
            own = pl.ds(thread * part[0], part[0])

            def one(turn: Array, begun: Array) -> Array:
                def accumulate(sums: Any) -> None:
                    def step(k: Array, _: None) -> None:
                        slot = jax.lax.rem(begun + k, stages)
                        plgpu.barrier_wait(filled.at[slot])
                        plgpu.wgmma(sums, x_ring.at[slot].at[own], w_ring.at[slot].transpose((1, 0)))
                        plgpu.wgmma_wait(1)  # the product of the step before has read its buffers

                        @pl.when(k > 0)
                        def _() -> None:
                            plgpu.barrier_arrive(emptied.at[jax.lax.rem(begun + k - 1, stages)])

                    jax.lax.fori_loop(0, steps, step, None)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(emptied.at[jax.lax.rem(begun + steps - 1, stages)])
                    store(turn, sums[...])

                pl.run_scoped(accumulate, plgpu.ACC(part, wide))
                return begun + steps

            jax.lax.fori_loop(0, mine, one, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def store(turn: Array, sums: Array) -> None:
            top, start = locate(turn)
            top = top + thread * part[0]
            plgpu.barrier_wait(ready)
            for i in range(0, part[0], CELL):
                at = pl.ds(thread * part[0] + i, CELL)
                by_row = plgpu.load(x_scales.at[at], layout=plgpu.Layout.WGMMA.reduce(1))
                for j in range(0, columns, CELL):
                    by_column = plgpu.load(w_scales.at[pl.ds(j, CELL)], layout=plgpu.Layout.WGMMA.reduce(0))
                    values = sums[i : i + CELL, j : j + CELL].astype(jnp.float32)
                    values = values * jax.lax.broadcast_in_dim(by_row, values.shape, [0])
                    values = values * jax.lax.broadcast_in_dim(by_column.astype(jnp.float32), values.shape, [1])
                    slot = (i // CELL * (columns // CELL) + j // CELL) % buffers
                    plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
                    cells[thread, slot] = values.astype(dtype)
                    plgpu.commit_smem()
                    place = out.at[pl.ds(top + i, CELL), pl.ds(start + j, CELL)]
                    plgpu.copy_smem_to_gmem(cells.at[thread, slot], place)
            plgpu.barrier_arrive(used)

        jax.lax.cond(thread == 2, copy, multiply)

    shared = plgpu.ClusterBarrier(collective_axes=("member",), num_arrivals=2, num_barriers=stages)
    alone = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((height, width), dtype),
        scratch_types=[
            _swizzled((stages, rows, DEPTH), x.dtype),
            _swizzled((stages, columns, DEPTH), w.dtype),
            plgpu.SMEM((rows,), jnp.float32),
            plgpu.SMEM((columns,), w_scale.dtype),
            _swizzled((2, buffers, CELL, CELL), dtype),
            alone,
            shared if cluster > 1 else alone,
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
        ],
        grid=(groups,),
        grid_names=("group",),
        cluster=(cluster,),
        cluster_names=("member",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(x, w, x_scale, w_scale)


def _swizzled(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """Shared memory as the tensor cores read it: rows of 128 bytes, eight to a tile."""
    tile = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tile, plgpu.SwizzleTransform(128)))
