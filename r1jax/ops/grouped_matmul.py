"""Rows sorted by expert times stacked expert weights, without dropped rows and without E times the work.

Rows go to a buffer in which each expert's group starts at a multiple of `block`; a block then meets one weight
matrix, and the product is a batched matmul. Both moves are gathers in the backward pass too (a scatter-add is
slow on CPU and not deterministic on GPU). On a Hopper GPU the product is a kernel (grouped_matmul_hopper.py).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from r1jax.ops.self_test import agrees, target


class Dispatch(NamedTuple):
    """Where each row goes: P = number of blocks x block rows of buffer, T tokens, K experts a token, E experts."""

    source: Int[Array, " P"]
    """Token of each buffer row; T for an empty row."""
    slot: Int[Array, "T K"]
    """Buffer row of each choice of each token."""
    choice: Int[Array, " P"]
    """Which flat choice t K + k sits in each buffer row; T K for an empty row."""
    block_expert: Int[Array, " blocks"]
    """E for a block behind the last group."""
    counts: Int[Array, " E"]


def plan_dispatch(experts: Int[Array, "T K"], num_experts: int, *, block: int = 128) -> Dispatch:
    """Orders the chosen experts of all tokens into blocks that belong to one expert each.

    Args:
      experts: Chosen experts of each token, distinct within a token.
      num_experts: E.
      block: Rows a block; a group wastes at most block - 1 rows.

    Returns:
      The plan; its arrays have static shapes whatever the routing.
    """
    tokens, k = experts.shape
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    counts = jnp.sum(jax.nn.one_hot(flat, num_experts, dtype=jnp.int32), axis=0)
    padded = (counts + block - 1) // block * block
    start, padded_start = jnp.cumsum(counts) - counts, jnp.cumsum(padded) - padded
    blocks = -(-tokens * k // block) + num_experts
    if block == 1:  # nothing is padded
        blocks = tokens * k
    ranked = flat[order]
    row = padded_start[ranked] + jnp.arange(tokens * k) - start[ranked]
    slot = jnp.zeros(tokens * k, jnp.int32).at[order].set(row.astype(jnp.int32), unique_indices=True)
    choice = jnp.full(blocks * block, tokens * k, jnp.int32).at[row].set(order.astype(jnp.int32), unique_indices=True)
    ends = jnp.cumsum(padded)
    block_expert = jnp.searchsorted(ends, jnp.arange(blocks) * block, side="right")
    return Dispatch(
        source=choice // k,
        slot=slot.reshape(tokens, k),
        choice=choice,
        block_expert=block_expert.astype(jnp.int32),
        counts=counts,
    )


def _take(rows: Float[Array, "n D"], index: Int[Array, " m"]) -> Float[Array, "m D"]:
    """rows[index], with zeros where the index is n."""
    return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def scatter_rows(x: Float[Array, "T D"], plan: Dispatch) -> Float[Array, "P D"]:
    """Copies each token's row to its K places of the buffer; empty rows are zero."""
    return _take(x, plan.source)


def _scatter_forward(x: Float[Array, "T D"], plan: Dispatch) -> tuple[Float[Array, "P D"], Dispatch]:
    return _take(x, plan.source), plan


def _scatter_backward(plan: Dispatch, gradient: Float[Array, "P D"]) -> tuple[Float[Array, "T D"], None]:
    return jnp.sum(gradient[plan.slot].astype(jnp.float32), axis=1).astype(gradient.dtype), None


scatter_rows.defvjp(_scatter_forward, _scatter_backward)


@jax.custom_vjp
def sum_rows(y: Float[Array, "P D"], plan: Dispatch) -> Float[Array, "T D"]:
    """Sum of each token's K rows of the buffer, in fp32; the transpose of `scatter_rows`."""
    return jnp.sum(y[plan.slot].astype(jnp.float32), axis=1).astype(y.dtype)


def _sum_forward(y: Float[Array, "P D"], plan: Dispatch) -> tuple[Float[Array, "T D"], Dispatch]:
    return sum_rows(y, plan), plan


def _sum_backward(plan: Dispatch, gradient: Float[Array, "T D"]) -> tuple[Float[Array, "P D"], None]:
    return _take(gradient, plan.source), None


sum_rows.defvjp(_sum_forward, _sum_backward)


@jax.custom_vjp
def scatter_choices(weights: Float[Array, "T K"], plan: Dispatch) -> Float[Array, " P"]:
    """Puts a number of each choice of each token beside its row of the buffer; empty rows have 0."""
    return jnp.take(weights.reshape(-1), plan.choice, mode="fill", fill_value=0)


def _choices_forward(weights: Float[Array, "T K"], plan: Dispatch) -> tuple[Float[Array, " P"], Dispatch]:
    return scatter_choices(weights, plan), plan


def _choices_backward(plan: Dispatch, gradient: Float[Array, " P"]) -> tuple[Float[Array, "T K"], None]:
    return gradient[plan.slot], None


scatter_choices.defvjp(_choices_forward, _choices_backward)


def grouped_matmul(
    x: Float[Array, "P D"], w: Float[Array, "E F D"], block_expert: Int[Array, " blocks"]
) -> Float[Array, "P F"]:
    """Each block of rows times its expert's weights, x w^T, with fp32 accumulation.

    Args:
      x: Buffer of rows; P is a multiple of the number of blocks.
      w: Stacked weights, [out, in] an expert.
      block_expert: Expert of each block, in rising order; E for a block of zeros.

    Returns:
      Array of x's dtype.
    """
    if _on_hopper(x, w, block_expert) and _hopper_agrees():
        return _hopper(x, w, block_expert)
    block_expert = jnp.minimum(block_expert, w.shape[0] - 1)
    blocks = x.reshape(block_expert.shape[0], -1, x.shape[-1])
    out = jnp.einsum("nbD,nFD->nbF", blocks, w[block_expert], preferred_element_type=jnp.float32)
    return out.astype(x.dtype).reshape(x.shape[0], -1)


def grouped_matmul_reference(
    x: Float[Array, "P D"], w: Float[Array, "E F D"], block_expert: Int[Array, " blocks"]
) -> Float[Array, "P F"]:
    """`grouped_matmul` as a masked product with every expert: E times the work, obviously right."""
    block_expert = jnp.minimum(block_expert, w.shape[0] - 1)
    row_expert = jnp.repeat(block_expert, x.shape[0] // block_expert.shape[0])
    every = jnp.einsum("PD,EFD->PEF", x, w)
    return jnp.take_along_axis(every, row_expert[:, None, None], axis=1)[:, 0]


def _on_hopper(x: Float[Array, "P D"], w: Float[Array, "E F D"], block_expert: Int[Array, " blocks"]) -> bool:
    """Whether the kernel takes such arrays, and no compiler would have to divide it among devices."""
    device = target()
    if device.platform != "gpu" or device.compute_capability != "9.0" or jax.__version_info__ < (0, 11):
        return False
    mesh = jax.sharding.get_abstract_mesh()
    whole = jax.device_count() == 1 or (not mesh.empty and mesh.are_all_axes_manual)
    fits = x.shape[0] == 128 * block_expert.shape[0] and not any(n % 64 for n in w.shape[1:])
    return whole and fits and x.dtype == w.dtype == jnp.bfloat16


@functools.cache
def _hopper_agrees() -> bool:
    """Tries the kernels on this device: four blocks, an expert without rows, widths that are no multiples of a tile."""
    rng = np.random.default_rng(0)
    experts = np.array([0, 0, 2, 3], np.int32)
    x = rng.standard_normal((512, 192)).astype(jnp.bfloat16)
    x[384:] = 0
    w = rng.standard_normal((3, 320, 192)).astype(jnp.bfloat16)

    def fast(x: Array, w: Array) -> Array:
        return _hopper(x, w, jnp.asarray(experts))

    def slow(x: Array, w: Array) -> Array:
        return jnp.where((jnp.arange(512) < 384)[:, None], grouped_matmul_reference(x, w, jnp.asarray(experts)), 0)

    return agrees("the kernel of routed experts", fast, slow, (x, w))


@jax.custom_vjp
def _hopper(
    x: Float[Array, "P D"], w: Float[Array, "E F D"], block_expert: Int[Array, " blocks"]
) -> Float[Array, "P F"]:
    """The kernels; where a block is of zeros, so must its gradient be."""
    from r1jax.ops import grouped_matmul_hopper as kernels

    return kernels.blocks_times_weights(x, w, block_expert, transposed=True, tiling=kernels.Tiling())


def _hopper_forward(
    x: Float[Array, "P D"], w: Float[Array, "E F D"], block_expert: Int[Array, " blocks"]
) -> tuple[Float[Array, "P F"], tuple[Array, Array, Array]]:
    return _hopper(x, w, block_expert), (x, w, block_expert)


def _hopper_backward(
    saved: tuple[Array, Array, Array], gradient: Float[Array, "P F"]
) -> tuple[Float[Array, "P D"], Float[Array, "E F D"], None]:
    from r1jax.ops import grouped_matmul_hopper as kernels

    x, w, block_expert = saved
    tiling = kernels.Tiling()
    first_block = jnp.searchsorted(block_expert, jnp.arange(w.shape[0] + 1), side="left").astype(jnp.int32)
    to_x = kernels.blocks_times_weights(gradient, w, block_expert, transposed=False, tiling=tiling)
    return to_x, kernels.blocks_times_blocks(gradient, x, first_block, block=128, tiling=tiling), None


_hopper.defvjp(_hopper_forward, _hopper_backward)
