"""Scaled dot-product attention; queries and keys may be wider than values, as in MLA."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SCORES = 2**26
"""Scores that are formed at once, 256 MB of fp32: of longer sequences, those of a block of queries after another."""


def dot_product_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N Hv"],
    *,
    scale: float,
    causal: bool,
    valid: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B T N Hv"]:
    """softmax(q k^T scale) v with the softmax in fp32; memory grows with the length, not with its square.

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
    batch, length, heads, width = q.shape
    block = max(1, SCORES // (batch * heads * k.shape[1]))
    if length <= block:
        return dot_product_attention_reference(q, k, v, scale=scale, causal=causal, valid=valid)

    @jax.checkpoint  # or the backward pass would keep the scores of all blocks
    def attend(part: tuple[Float[Array, "B block N H"], Int[Array, " block"]]) -> Float[Array, "B block N Hv"]:
        return _attend(part[0], k, v, part[1] if causal else None, scale, valid)

    count = -(-length // block)
    blocks = jnp.pad(q, ((0, 0), (0, count * block - length), (0, 0), (0, 0))).reshape(
        batch, count, block, heads, width
    )
    mixed = jax.lax.map(attend, (jnp.moveaxis(blocks, 1, 0), jnp.arange(count * block).reshape(count, block)))
    return jnp.moveaxis(mixed, 0, 1).reshape(batch, count * block, heads, -1)[:, :length]


def dot_product_attention_reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N Hv"],
    *,
    scale: float,
    causal: bool,
    valid: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B T N Hv"]:
    """`dot_product_attention` with all scores at once."""
    return _attend(q, k, v, jnp.arange(q.shape[1]) if causal else None, scale, valid)


def _attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N Hv"],
    places: Int[Array, " T"] | None,
    scale: float,
    valid: Bool[Array, "B S"] | None,
) -> Float[Array, "B T N Hv"]:
    """Attention of some queries to all keys, or to those up to their own places."""
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32) * scale
    lowest = jnp.finfo(jnp.float32).min
    if places is not None:
        seen = places[:, None] >= jnp.arange(k.shape[1])[None, :]
        scores = jnp.where(seen[None, None], scores, lowest)
    if valid is not None:
        scores = jnp.where(valid[:, None, None, :], scores, lowest)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BNTS,BSNH->BTNH", probs, v, preferred_element_type=jnp.float32).astype(q.dtype)
