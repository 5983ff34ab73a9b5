"""Root mean square normalisation (Zhang and Sennrich 2019)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*B D"], gain: Float[Array, " D"], eps: float, first_axis: int = -1
) -> Float[Array, "*B D"]:
    """Divides by the root mean square and multiplies with a gain, in fp32.

    Args:
      x: Rows.
      gain: The norm's weight.
      eps: Added to the mean square.
      first_axis: The mean is over this axis and all after it.

    Returns:
      Array of x's dtype.
    """
    wide = x.astype(jnp.float32)
    axes = tuple(range(first_axis % x.ndim, x.ndim))
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=axes, keepdims=True) + eps)
    return (wide * jnp.broadcast_to(gain.astype(jnp.float32), wide.shape)).astype(x.dtype)
