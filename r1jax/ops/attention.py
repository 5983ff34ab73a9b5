"""Scaled dot-product attention; queries and keys may be wider than values, as in MLA."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from r1jax.ops import attention_cudnn
from r1jax.ops.self_test import agrees, target

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

    On a GPU, cuDNN computes long sequences in bf16 and fp16 (attention_cudnn.py). Under causality a mask costs time
    there and says nothing where all that exists comes first: queries that exist never see what is behind them.

    Args:
      q: Queries.
      k: Keys.
      v: Values.
      scale: Factor on the scores.
      causal: Query t sees keys 0..t (T equals S).
      valid: Keys that may be seen; what a query gets that sees none, or that is causal and itself at a place that is
        not valid, is finite but has no meaning, and no gradient is NaN.

    Returns:
      Array of q's dtype.
    """
    if is_fused(q, k, v, causal=causal, masked=valid is not None):
        return attention_cudnn.fused_attention(q, k, v, scale=scale, causal=causal, valid=valid)
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


def is_fused(
    q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], v: Float[Array, "B S N Hv"], *, causal: bool, masked: bool
) -> bool:
    """Whether cuDNN computes such attention in a program that is traced now; tries it before it says so."""
    if target().platform != "gpu" or not attention_cudnn.takes(q, k, v):
        return False
    return _cudnn_agrees(q.dtype, (q.shape[-1], v.shape[-1]), causal, masked)


@functools.cache
def _cudnn_agrees(dtype: DTypeLike, widths: tuple[int, int], causal: bool, masked: bool) -> bool:
    """Tries cuDNN on this device, once for each kind of arrays, at lengths that are odd and no multiple of its tiles.

    Args:
      dtype: Of all arrays.
      widths: Of keys and values.
      causal: As in `dot_product_attention`.
      masked: Whether `valid` is given.
    """
    rng = np.random.default_rng(0)
    queries, keys = 173 if causal else 151, 173
    shapes = ((2, queries, 2, widths[0]), (2, keys, 2, widths[0]), (2, keys, 2, widths[1]))
    # Of NumPy, for the caller is tracing a program.
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    exists = np.ones((2, keys), bool)
    exists[0, 5:40], exists[1, -9:] = False, False

    def run(attend: Callable[..., Array], q: Array, k: Array, v: Array) -> Array:
        valid = jnp.asarray(exists) if masked else None
        out = attend(q, k, v, scale=widths[0] ** -0.5, causal=causal, valid=valid)
        return jnp.where(valid[:, :, None, None], out, 0) if causal and masked else out

    ways = (attention_cudnn.fused_attention, dot_product_attention_reference)
    name = f"cuDNN's attention of {jnp.dtype(dtype).name}, width {widths[0]} and {widths[1]},"
    return agrees(name, *(functools.partial(run, way) for way in ways), arrays)


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
