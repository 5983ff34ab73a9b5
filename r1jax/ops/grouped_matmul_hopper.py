"""Grouped matrix products for NVIDIA's Hopper: one persistent kernel, written with Pallas for Mosaic GPU.

A thread block keeps to one multiprocessor and works through tiles of the result. One of its three warpgroups copies
operands into a ring of buffers, the other two multiply half a tile each; the ring goes on from tile to tile, so that
the next tile's operands arrive while this one's result is stored. Rows come in blocks of one expert each, as
`grouped_matmul.plan_dispatch` lays them out: a tile never has rows of two experts.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from r1jax.ops.self_test import multiprocessors

ROWS = 128
"""Rows of a tile: those of a block of one expert."""


class Tiling(NamedTuple):
    """How a product is cut; what a thread block holds must fit into 227 KiB of shared memory."""

    rows: int = ROWS
    columns: int = 256
    depth: int = 64
    """Of one step along the contracted axis."""
    stages: int = 4
    """Buffers of the ring."""
    band: int = 8
    """Tiles along the columns that are done before the next row of tiles."""
    split_rows: bool = True
    """The two multiplying warpgroups share a tile's columns and split its rows; or the other way round."""


class _Tile(NamedTuple):
    """One tile of the result."""

    steps: Int[Array, ""]
    left: Callable[[Array], tuple]
    """Index of the left operand's part for a step."""
    right: Callable[[Array], tuple]
    out: tuple
    """Index of the tile in the result but for its last two axes, and then where those begin."""


def blocks_times_weights(
    x: Float[Array, "P D"], w: Array, block_expert: Int[Array, " blocks"], *, transposed: bool, tiling: Tiling
) -> Float[Array, "P F"]:
    """Each block of rows times the weights of its expert.

    Args:
      x: Rows; their number is that of the blocks times `tiling.rows`.
      w: Of each expert [F, D] if transposed, else [D, F].
      block_expert: Of each block; one beyond the last expert stands for a block that is zero, which costs no product.
      transposed: Whether the last axis of w is contracted.
      tiling: D must be a multiple of its depth.

    Returns:
      Array of x's dtype, summed in fp32.
    """
    experts, width = w.shape[0], w.shape[1 if transposed else 2]
    rows, columns, depth = tiling.rows, tiling.columns, tiling.depth
    steps = x.shape[1] // depth

    def tile(expert_of: Any, i: Array, j: Array) -> _Tile:
        expert = expert_of[i]
        owner = jnp.minimum(expert, experts - 1)
        across, down = pl.ds(j * columns, columns), lambda k: pl.ds(k * depth, depth)
        return _Tile(
            jnp.where(expert < experts, steps, 0),
            lambda k: (pl.ds(i * rows, rows), down(k)),
            lambda k: (owner, across, down(k)) if transposed else (owner, down(k), across),
            ((), i * rows, j * columns),
        )

    grid = (1, block_expert.shape[0], pl.cdiv(width, columns))
    shape = jax.ShapeDtypeStruct((x.shape[0], width), x.dtype)
    return _multiply(
        x, w, block_expert, lambda meta, _, i, j: tile(meta, i, j), grid, shape, (False, transposed), tiling
    )


def blocks_times_blocks(
    a: Float[Array, "P M"], b: Float[Array, "P N"], first_block: Int[Array, " starts"], *, block: int, tiling: Tiling
) -> Float[Array, "E M N"]:
    """Sum over the rows of each expert of the outer products of a and b: the gradient of its weights.

    Args:
      a: Rows.
      b: Rows.
      first_block: Of each of E experts, and where the last one's end, E + 1 in all.
      block: Rows a block, a multiple of the tiling's depth.
      tiling: Sizes.

    Returns:
      Array of a's dtype, summed in fp32; zero for an expert without rows.
    """
    experts, rows, columns, depth = first_block.shape[0] - 1, tiling.rows, tiling.columns, tiling.depth

    def tile(first: Any, expert: Array, i: Array, j: Array) -> _Tile:
        start, end = first[expert] * block, first[expert + 1] * block
        along = lambda k: pl.ds(start + k * depth, depth)  # noqa: E731
        return _Tile(
            (end - start) // depth,
            lambda k: (along(k), pl.ds(i * rows, rows)),
            lambda k: (along(k), pl.ds(j * columns, columns)),
            ((expert,), i * rows, j * columns),
        )

    grid = (experts, pl.cdiv(a.shape[1], rows), pl.cdiv(b.shape[1], columns))
    shape = jax.ShapeDtypeStruct((experts, a.shape[1], b.shape[1]), a.dtype)
    return _multiply(a, b, first_block, tile, grid, shape, (True, False), tiling)


def _multiply(
    left: Array,
    right: Array,
    meta: Int[Array, " meta"],
    tile_at: Callable[..., _Tile],
    grid: tuple[int, int, int],
    shape: jax.ShapeDtypeStruct,
    turned: tuple[bool, bool],
    tiling: Tiling,
) -> Array:
    """Runs the persistent kernel over a grid of tiles.

    Args:
      left: Operand whose tiles are [rows, depth], or [depth, rows] if turned.
      right: Operand whose tiles are [depth, columns], or [columns, depth] if turned.
      meta: Integers that `tile_at` reads.
      tile_at: (meta, g, i, j) -> tile.
      grid: Tiles along each axis; the last varies fastest, in bands.
      shape: Of the result.
      turned: Of each operand.
      tiling: Sizes.
    """
    rows, columns, depth, stages, band, split_rows = tiling
    part = (rows // 2, columns) if split_rows else (rows, columns // 2)
    cell = (min(64, part[0]), math.gcd(64, part[1]))
    count = multiprocessors()
    tiles = grid[0] * grid[1] * grid[2]

    def body(meta, left, right, out, left_ring, right_ring, cells, filled, emptied):
        me, thread = jax.lax.axis_index("sm"), jax.lax.axis_index("wg")
        mine = (tiles - me + count - 1) // count

        def locate(turn: Array) -> _Tile:
            index = me + turn * count
            area = grid[1] * grid[2]
            i, j = plgpu.planar_snake(jax.lax.rem(index, area), grid[1:], 1, band)
            return tile_at(meta, jax.lax.div(index, area), i, j)

        def copy() -> None:
            plgpu.set_max_registers(40, action="decrease")

            def one(turn: Array, begun: Array) -> Array:
                tile = locate(turn)

                def step(k: Array, _: None) -> None:
                    slot = jax.lax.rem(begun + k, stages)
                    plgpu.barrier_wait(emptied.at[slot])
                    plgpu.copy_gmem_to_smem(left.at[tile.left(k)], left_ring.at[slot], filled.at[slot])
                    plgpu.copy_gmem_to_smem(right.at[tile.right(k)], right_ring.at[slot], filled.at[slot])

                jax.lax.fori_loop(0, tile.steps, step, None)
                return begun + tile.steps

            jax.lax.fori_loop(0, mine, one, jnp.int32(0))
            for slot in range(stages):  # a barrier must not be left before its last phase
                plgpu.barrier_wait(emptied.at[slot])

        def multiply() -> None:
            plgpu.set_max_registers(232, action="increase")
            for slot in range(stages):
                plgpu.barrier_arrive(emptied.at[slot])
            # The other warpgroup's half of a tile is left out by static slices, which the copies' layout allows.
            own = pl.ds(thread * (part[0] if split_rows else part[1]), part[0] if split_rows else part[1])

            def operands(slot: Array) -> tuple:
                a, b = left_ring.at[slot], right_ring.at[slot]
                if split_rows:
                    a = a.at[:, own] if turned[0] else a.at[own]
                else:
                    b = b.at[own] if turned[1] else b.at[:, own]
                return a.transpose((1, 0)) if turned[0] else a, b.transpose((1, 0)) if turned[1] else b

            def one(turn: Array, begun: Array) -> Array:
                tile = locate(turn)

                def accumulate(sums) -> None:
                    def step(k: Array, _: None) -> None:
                        slot = jax.lax.rem(begun + k, stages)
                        plgpu.barrier_wait(filled.at[slot])
                        plgpu.wgmma(sums, *operands(slot))
                        plgpu.wgmma_wait(1)  # the product of the step before has read its buffers

                        @pl.when(k > 0)
                        def _() -> None:
                            plgpu.barrier_arrive(emptied.at[jax.lax.rem(begun + k - 1, stages)])

                    jax.lax.fori_loop(0, tile.steps, step, None)
                    plgpu.wgmma_wait(0)

                    @pl.when(tile.steps > 0)
                    def _() -> None:
                        plgpu.barrier_arrive(emptied.at[jax.lax.rem(begun + tile.steps - 1, stages)])

                    store(tile, sums[...].astype(shape.dtype))

                pl.run_scoped(accumulate, plgpu.ACC(part, jnp.float32))
                return begun + tile.steps

            jax.lax.fori_loop(0, mine, one, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def store(tile: _Tile, values: Array) -> None:
            lead, top, start = tile.out
            top, start = (top + thread * part[0], start) if split_rows else (top, start + thread * part[1])
            for i in range(part[0] // cell[0]):
                for j in range(part[1] // cell[1]):
                    slot = (i * (part[1] // cell[1]) + j) % 2
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    cells[thread, slot] = values[i * cell[0] : (i + 1) * cell[0], j * cell[1] : (j + 1) * cell[1]]
                    plgpu.commit_smem()
                    at = (*lead, pl.ds(top + i * cell[0], cell[0]), pl.ds(start + j * cell[1], cell[1]))
                    plgpu.copy_smem_to_gmem(cells.at[thread, slot], out.at[at])

        jax.lax.cond(thread == 2, copy, multiply)

    def shared(shape: tuple[int, ...], dtype):
        swizzle = plgpu.find_swizzle(shape[-1] * jnp.dtype(dtype).itemsize * 8)
        tile = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
        return plgpu.SMEM(shape, dtype, transforms=(tile, plgpu.SwizzleTransform(swizzle)))

    left_tile = (depth, rows) if turned[0] else (rows, depth)
    right_tile = (columns, depth) if turned[1] else (depth, columns)
    return plgpu.kernel(
        body,
        out_type=shape,
        scratch_types=[
            shared((stages, *left_tile), left.dtype),
            shared((stages, *right_tile), right.dtype),
            shared((2, 2, *cell), shape.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ],
        grid=(count,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(meta, left, right)
