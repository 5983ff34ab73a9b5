"""Rows sorted by expert times stacked expert weights, without dropped rows and without E times the work.

Rows go to a buffer in which each expert's group starts at a multiple of `block`; a block then meets one weight
matrix, and the product is a batched matmul. Both moves are gathers in the backward pass too (a scatter-add is
slow on CPU and not deterministic on GPU).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Dispatch(NamedTuple):
    """Where each row goes: P = number of blocks x block rows of buffer, T tokens, K experts a token, E experts."""

    source: Int[Array, " P"]
    """Token of each buffer row; T for an empty row."""
    slot: Int[Array, "T K"]
    """Buffer row of each choice of each token."""
    choice: Int[Array, " P"]
    """Which flat choice t K + k sits in each buffer row; T K for an empty row."""
    block_expert: Int[Array, " blocks"]
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
        block_expert=jnp.minimum(block_expert, num_experts - 1).astype(jnp.int32),
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
    return jnp.sum(gradient[plan.slot], axis=1), None


scatter_rows.defvjp(_scatter_forward, _scatter_backward)


@jax.custom_vjp
def gather_rows(y: Float[Array, "P D"], plan: Dispatch) -> Float[Array, "T K D"]:
    """Brings the buffer's rows back to the tokens that sent them."""
    return y[plan.slot]


def _gather_forward(y: Float[Array, "P D"], plan: Dispatch) -> tuple[Float[Array, "T K D"], Dispatch]:
    return y[plan.slot], plan


def _gather_backward(plan: Dispatch, gradient: Float[Array, "T K D"]) -> tuple[Float[Array, "P D"], None]:
    return _take(gradient.reshape(-1, gradient.shape[-1]), plan.choice), None


gather_rows.defvjp(_gather_forward, _gather_backward)


def grouped_matmul(
    x: Float[Array, "P D"], w: Float[Array, "E F D"], block_expert: Int[Array, " blocks"]
) -> Float[Array, "P F"]:
    """Each block of rows times its expert's weights, x w^T, with fp32 accumulation.

    Args:
      x: Buffer of rows; P is a multiple of the number of blocks.
      w: Stacked weights, [out, in] an expert.
      block_expert: Expert of each block.

    Returns:
      Array of x's dtype.
    """
    blocks = x.reshape(block_expert.shape[0], -1, x.shape[-1])
    out = jnp.einsum("nbD,nFD->nbF", blocks, w[block_expert], preferred_element_type=jnp.float32)
    return out.astype(x.dtype).reshape(x.shape[0], -1)


def grouped_matmul_reference(
    x: Float[Array, "P D"], w: Float[Array, "E F D"], block_expert: Int[Array, " blocks"]
) -> Float[Array, "P F"]:
    """`grouped_matmul` as a masked product with every expert: E times the work, obviously right."""
    row_expert = jnp.repeat(block_expert, x.shape[0] // block_expert.shape[0])
    every = jnp.einsum("PD,EFD->PEF", x, w)
    return jnp.take_along_axis(every, row_expert[:, None, None], axis=1)[:, 0]
