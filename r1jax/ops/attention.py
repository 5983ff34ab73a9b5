"""Scaled dot-product attention; queries and keys may be wider than values, as in MLA."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def dot_product_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N Hv"],
    *,
    scale: float,
    causal: bool,
    valid: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B T N Hv"]:
    """softmax(q k^T scale) v with the softmax in fp32.

    Args:
      q: Queries.
      k: Keys.
      v: Values.
      scale: Factor on the scores.
      causal: Query t sees keys 0..t (T equals S).
      valid: Keys that may be seen; a query that sees none gets the mean of all values, and no gradient is NaN.

    Returns:
      Array of q's dtype.
    """
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32) * scale
    lowest = jnp.finfo(jnp.float32).min
    if causal:
        t, s = scores.shape[-2:]
        scores = jnp.where(jnp.tril(jnp.ones((t, s), bool))[None, None], scores, lowest)
    if valid is not None:
        scores = jnp.where(valid[:, None, None, :], scores, lowest)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BNTS,BSNH->BTNH", probs, v, preferred_element_type=jnp.float32).astype(q.dtype)
