"""Products of routed experts in rounded numbers: each block of rows times the matrix of its own expert."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float, Int, PRNGKeyArray

from r1jax.ops.quantize import Quantized, block_of, quantize
from r1jax.ops.quantized_dot import Scheme, multiply, product_gradients, weight_codes

TOGETHER = 16
"""Blocks of rows whose experts' weights are gathered at a time: of all, they would be as many matrices."""


def grouped_quantized_dot(
    rows: Float[Array, "P I"],
    weight: Float[Array, "E O I"] | Quantized,
    block_expert: Int[Array, " blocks"],
    scheme: Scheme,
    *,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "P O"]:
    """Each block of rows times its expert's rounded weights: one scale an expert and output, and one a row.

    Args:
      rows: P is a multiple of the number of blocks.
      weight: Stacked floats or codes.
      block_expert: Expert of each block; E for a block of zeros.
      scheme: How; its activations are rounded.
      key: As in `quantized_dot`.

    Returns:
      Array of the rows' dtype.
    """
    count, last = block_expert.shape[0], weight.shape[0] - 1
    codes, trained = weight_codes(weight, scheme), None if isinstance(weight, Quantized) else weight
    keys = None if key is None else jax.random.split(key, count)
    blocks = rows.reshape(count, -1, rows.shape[-1])
    products = _grouped(scheme, blocks, trained, codes, jnp.minimum(block_expert, last), keys)
    return products.reshape(rows.shape[0], -1)  # of an exported program a number that has no `len`


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(scheme: Scheme, x: Array, weight: Array | None, codes: Quantized, own: Array, keys: Any) -> Array:
    """`_product` of each block with the matrix of its own, a few blocks at a time."""
    return _grouped_forward(scheme, x, weight, codes, own, keys)[0]


def _grouped_forward(
    scheme: Scheme, x: Array, weight: Array | None, codes: Quantized, own: Array, keys: Any
) -> tuple[Array, tuple[Any, ...]]:
    def one(block: tuple[Quantized, Array]) -> Array:
        return multiply(block[0], _of(codes, block[1])).astype(x.dtype)

    narrow, like = quantize(x, scheme.activations, block=block_of(codes)), jnp.zeros((), x.dtype)
    saved = narrow, like, codes, None if weight is None else jnp.zeros((), weight.dtype), own, keys
    if is_symbolic_dim(own.shape[0]):  # of an exported program, which gathers all of them, as that of floats does
        return jax.vmap(one)((narrow, own)), saved
    return jax.lax.map(one, (narrow, own), batch_size=TOGETHER), saved


def _grouped_backward(
    scheme: Scheme, saved: tuple[Any, ...], gradient: Array
) -> tuple[Array, Array | None, None, None, None]:
    x, x_like, codes, like, own, keys = saved
    wide = None if like is None else jnp.zeros((), jnp.float32)  # as the sum over blocks

    def one(x: Quantized, own: Array, key: Array | None, gradient: Array) -> tuple[Array, Array | None]:
        return product_gradients(scheme, (x, x_like, _of(codes, own), wide, key), gradient)[:2]

    def turn(total: Array | None, blocks: tuple[Any, ...]) -> tuple[Array | None, Array]:
        to_x, to_w = jax.vmap(one)(*blocks)
        return None if total is None else total.at[blocks[1]].add(to_w), to_x

    total = None if like is None else jnp.zeros(codes.shape, jnp.float32)
    blocks, whole = (x, own, keys, gradient), len(own) // TOGETHER * TOGETHER
    parts = []
    if whole:
        first = jax.tree.map(lambda a: a[:whole].reshape(-1, TOGETHER, *a.shape[1:]), blocks)
        total, to_x = jax.lax.scan(turn, total, first)
        parts.append(to_x.reshape(whole, *x.shape[1:]))
    if whole < len(own):
        total, to_x = turn(total, jax.tree.map(lambda a: a[whole:], blocks))
        parts.append(to_x)
    return jnp.concatenate(parts), None if like is None else total.astype(like.dtype), None, None, None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _of(codes: Quantized, expert: Array) -> Quantized:
    return jax.tree.map(lambda part: part[expert], codes)  # narrow numbers are gathered
