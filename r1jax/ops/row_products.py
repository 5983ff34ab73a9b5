"""Products of the rows of a step of decoding, with the norm before and the SwiGLU or residual after them.

On a Hopper GPU a few rows take one launch a product (row_products_kernel.py); elsewhere a compiler fuses what it can.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from r1jax.ops.norm import rms_norm
from r1jax.ops.quantize import Quantized
from r1jax.ops.self_test import agrees, takes_triton
from r1jax.ops.weight_only import weight_only_dot

MOST = 8
"""Rows up to which the kernel is taken."""


def row_product(
    x: Float[Array, "T J"],
    weight: Float[Array, "O I"] | Quantized,
    *,
    gain: Float[Array, " I"] | None = None,
    eps: float = 0.0,
    added: Float[Array, "T O"] | None = None,
    paired: bool = False,
) -> Float[Array, "T F"]:
    """norm(x) W^T, then SwiGLU or a sum.

    Args:
      x: Rows; of longer ones than the weight's the first I numbers count.
      weight: Floats of x's dtype, or codes.
      gain: Weight of an RMSNorm before the product; None leaves the norm out.
      eps: Of the norm.
      added: To the result, such as the residual stream.
      paired: Whether the weight is gate above up; the result is silu(gate) * up, of half the width.

    Returns:
      Array of x's dtype.
    """
    if len(x) <= MOST and takes_triton() and x.dtype == jnp.bfloat16 and _kernel_agrees():
        from r1jax.ops import row_products_kernel

        if row_products_kernel.fits(x, weight):
            return row_products_kernel.rows_times_weight(x, weight, gain=gain, eps=eps, added=added, paired=paired)
    return row_product_reference(x, weight, gain=gain, eps=eps, added=added, paired=paired)


def row_product_reference(
    x: Float[Array, "T J"],
    weight: Float[Array, "O I"] | Quantized,
    *,
    gain: Float[Array, " I"] | None = None,
    eps: float = 0.0,
    added: Float[Array, "T O"] | None = None,
    paired: bool = False,
) -> Float[Array, "T F"]:
    """`row_product` one step after another, rounded to x's dtype after each as the modules round.

    Args:
      x: Rows.
      weight: Floats or codes.
      gain: Of the norm.
      eps: Of the norm.
      added: To the result.
      paired: Gate above up.

    Returns:
      Array of x's dtype.
    """
    x = x[:, : weight.shape[1]]
    if gain is not None:
        x = rms_norm(x, gain, eps)
    y = weight_only_dot(x, weight) if isinstance(weight, Quantized) else jnp.einsum("TI,OI->TO", x, weight)
    if paired:
        gate, up = jnp.split(y, 2, axis=-1)
        y = jax.nn.silu(gate) * up
    return y if added is None else added + y


@functools.cache
def _kernel_agrees() -> bool:
    """Tries the kernel on this device: norm, SwiGLU and residual, floats and codes, one and several rows a program."""
    from r1jax.ops.row_products_kernel import rows_times_weight

    rng = np.random.default_rng(0)
    codes = Quantized(
        rng.integers(-127, 128, (64, 704)).astype(np.int8), rng.uniform(0.001, 0.002, (64, 1)).astype(jnp.bfloat16)
    )
    gain = rng.uniform(0.5, 2, 704).astype(np.float32)

    def all_ways(product, codes: Quantized, x: Array, w: Array, added: Array) -> Array:
        few = product(x, w, gain=jnp.asarray(gain), eps=1e-6, paired=True) + product(x, codes, added=added)
        one = product(x[:1], w, gain=jnp.asarray(gain), eps=1e-6, paired=True) + product(x[:1], codes, added=added[:1])
        return jnp.concatenate([few, one])

    arrays = [rng.standard_normal(shape).astype(jnp.bfloat16) for shape in ((3, 704), (128, 704), (3, 64))]
    arrays[1] = (arrays[1].astype(np.float32) * 0.05).astype(jnp.bfloat16)
    fast = functools.partial(all_ways, rows_times_weight, jax.tree.map(jnp.asarray, codes))
    slow = functools.partial(all_ways, row_product_reference, jax.tree.map(jnp.asarray, codes))
    return agrees("the kernel of a few rows and a weight", fast, slow, arrays, gradients=False)
