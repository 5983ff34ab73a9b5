"""Products of floats with weights that are held as codes: what leaves memory is narrow, what is multiplied is not.

A token a step reads every weight once and does little with it, so that fewer bytes are less time. Codes of 8 bits are
exact in bf16, and a scale a row is applied to the sum: no float copy of the weight is ever needed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from r1jax.ops.quantize import Quantized, block_of, dequantize
from r1jax.ops.self_test import agrees, takes_triton, target

FEW = 2
"""Rows up to which a GPU sums products instead of calling a library, which would have the codes widened in memory."""


def weight_only_dot(x: Float[Array, "*B I"], codes: Quantized) -> Float[Array, "*B O"]:
    """X w^T with a weight of codes.

    Args:
      x: Rows, of floats.
      codes: [O, I].

    Returns:
      Array of x's dtype, summed in fp32.
    """
    if _on_kernel(codes) and x.size == x.shape[-1] and _kernel_agrees():
        return _kernel(x.reshape(-1), codes).reshape(*x.shape[:-1], -1)
    w, scale = _factors(codes, x)
    if target().platform == "gpu" and x.size <= FEW * x.shape[-1]:
        wide = w.astype(jnp.float32).reshape(*[1] * (x.ndim - 1), *w.shape)
        y = jnp.sum(x.astype(jnp.float32)[..., None, :] * wide, axis=-1)
    else:
        y = jnp.einsum("...I,OI->...O", x, w, preferred_element_type=jnp.float32)
    return (y if scale is None else y * jnp.broadcast_to(scale[:, 0], y.shape)).astype(x.dtype)


def _on_kernel(codes: Quantized) -> bool:
    """Whether the kernel takes such a weight, and no compiler would have to divide it among devices."""
    if not takes_triton():
        return False
    from r1jax.ops import weight_only_kernel

    return codes.values.dtype == jnp.int8 and weight_only_kernel.fits(codes)


@jax.custom_vjp
def _kernel(x: Float[Array, " I"], codes: Quantized) -> Float[Array, " O"]:
    from r1jax.ops import weight_only_kernel

    return weight_only_kernel.row_times_codes(x, codes)


def _kernel_backward(codes: Quantized, gradient: Float[Array, " O"]) -> tuple[Float[Array, " I"], None]:
    return jnp.einsum("O,OI->I", gradient, dequantize(codes, gradient.dtype)), None


_kernel.defvjp(lambda x, codes: (_kernel(x, codes), codes), _kernel_backward)


@functools.cache
def _kernel_agrees() -> bool:
    """Tries the kernel on this device."""
    rng = np.random.default_rng(0)
    # NumPy's: JAX's own would become part of the program that is being traced.
    codes = Quantized(
        rng.integers(-127, 128, (64, 2048)).astype(np.int8), rng.uniform(0.5, 2, (64, 1)).astype(jnp.bfloat16)
    )

    exact = codes.values * codes.scale.astype(np.float32)

    def fast(x: Array) -> Array:
        return _kernel(x, jax.tree.map(jnp.asarray, codes))

    def slow(x: Array) -> Array:
        return jnp.einsum("I,OI->O", x, exact)

    x = rng.standard_normal(2048).astype(jnp.bfloat16)
    return agrees("the kernel of a row and a weight of codes", fast, slow, (x,))


def grouped_weight_only_dot(
    rows: Float[Array, "P I"], codes: Quantized, block_expert: Int[Array, " blocks"]
) -> Float[Array, "P O"]:
    """Each block of rows times its expert's codes; of the other experts nothing is read.

    Args:
      rows: P is a multiple of the number of blocks.
      codes: Stacked, [E, O, I].
      block_expert: Expert of each block; E for a block of zeros.

    Returns:
      Array of the rows' dtype, summed in fp32.
    """
    own = jnp.minimum(block_expert, codes.shape[0] - 1)
    blocks = rows.reshape(own.shape[0], -1, rows.shape[-1])
    w, scale = _factors(jax.tree.map(lambda part: part[own], codes), rows)
    if target().platform == "gpu" and blocks.shape[1] <= FEW:
        y = jnp.sum(blocks.astype(jnp.float32)[:, :, None, :] * w.astype(jnp.float32)[:, None], axis=-1)
    else:
        y = jnp.einsum("nbI,nOI->nbO", blocks, w, preferred_element_type=jnp.float32)
    y = y if scale is None else y * scale[:, None, :, 0]
    return y.astype(rows.dtype).reshape(rows.shape[0], -1)


def _factors(codes: Quantized, like: Array) -> tuple[Float[Array, "*E O I"], Float[Array, "*E O 1"] | None]:
    """What rows are multiplied with, in their dtype, and the scale of the sums; None where it differs within a sum."""
    if block_of(codes) is None and codes.zero is None and codes.balance is None:
        return codes.values.astype(like.dtype), codes.scale.astype(jnp.float32)
    return dequantize(codes, like.dtype), None
