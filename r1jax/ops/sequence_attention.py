"""Multi-head latent attention over a sequence that is divided over devices: they exchange latents, not keys and values.

A token's latent and its rotary key are all that the other devices need (576 numbers in DeepSeek-V3, where its keys and
values of 128 heads are 40,960). Each device gathers those of the whole sequence, expands them for its own heads, and
attends from its own tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from r1jax.ops.attention import SCORES
from r1jax.ops.axes import axes_of, placement, spread


def length_axes(length: int) -> tuple[str, ...]:
    """Mesh axes over which a sequence of that length is divided; none on one device, or where it does not divide."""
    where = placement()
    return () if where is None else axes_of(where.spec(("length",), (length,))[0])


def sequence_attention(
    q: Float[Array, "B T N H"],
    latent: Float[Array, "B T R"],
    k_rope: Float[Array, "B T Hr"],
    kv_b: Float[Array, "N O R"],
    valid: Bool[Array, "B T"] | None,
    *,
    scale: float,
) -> Float[Array, "B T N Hv"]:
    """Causal attention with keys [k_nope; k_rope], where [k_nope; v] of each head is its part of kv_b times the latent.

    Args:
      q: Queries, the part without position first.
      latent: Normed latents.
      k_rope: Turned keys that all heads share.
      kv_b: Expansion of the latents, for each head.
      valid: Tokens that may be seen; None is all.
      scale: Factor on the scores.

    Returns:
      Mixed values, equal to attention on one device.
    """
    where, axes = placement(), length_axes(q.shape[1])
    assert where is not None and axes
    heads = where.spec(("batch", "length", "heads", None), q.shape)
    rows, tokens = where.spec(("batch", "length", None), latent.shape), where.spec(("batch", "length"), q.shape[:2])
    nope, rank = q.shape[-1] - k_rope.shape[-1], latent.shape[-1]

    def local(q: Array, latent: Array, k_rope: Array, kv_b: Array, *valid: Array) -> Array:
        shared = jax.lax.all_gather(jnp.concatenate([latent, k_rope], axis=-1), axes, axis=1, tiled=True)
        seen = jax.lax.all_gather(valid[0], axes, axis=1, tiled=True) if valid else None
        latent, k_rope = jnp.split(shared, [rank], axis=-1)
        k_nope, v = jnp.split(jnp.einsum("BSR,NOR->BSNO", latent, kv_b), [nope], axis=-1)
        turned = jnp.broadcast_to(k_rope[:, :, None, :], (*k_nope.shape[:-1], k_rope.shape[-1]))
        first = jax.lax.axis_index(axes) * q.shape[1]
        return attend_from(first, q, jnp.concatenate([k_nope, turned], axis=-1), v, seen, scale)

    weight = where.spec(("heads", None, None), kv_b.shape)
    arrays = (q, latent, k_rope, kv_b) if valid is None else (q, latent, k_rope, kv_b, valid)
    return spread(local, (heads, rows, rows, weight, tokens)[: len(arrays)], heads)(*arrays)


def attend_from(
    first: Int[Array, ""] | int,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N Hv"],
    valid: Bool[Array, "B S"] | None,
    scale: float,
) -> Float[Array, "B T N Hv"]:
    """Causal attention of queries at the places first, first + 1, ... to the keys at 0, 1, ..., some at a time."""
    batch, length, heads, _ = q.shape
    block = max(1, min(length, SCORES // (batch * heads * k.shape[1])))
    count = -(-length // block)
    padded = jnp.pad(q, ((0, 0), (0, count * block - length), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(batch, count, block, heads, -1), 1, 0)
    places = first + jnp.arange(count * block).reshape(count, block)

    @jax.checkpoint  # or the backward pass would keep the scores of all blocks
    def attend(part: tuple[Float[Array, "B block N H"], Int[Array, " block"]]) -> Float[Array, "B block N Hv"]:
        q, place = part
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32) * scale
        seen = (place[:, None] >= jnp.arange(k.shape[1])[None])[None, None]
        seen = seen if valid is None else seen & valid[:, None, None, :]
        probs = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(v.dtype)
        return jnp.einsum("BNTS,BSNH->BTNH", probs, v, preferred_element_type=jnp.float32).astype(q.dtype)

    mixed = jnp.moveaxis(jax.lax.map(attend, (blocks, places)), 0, 1)
    return mixed.reshape(batch, count * block, heads, -1)[:, :length]
