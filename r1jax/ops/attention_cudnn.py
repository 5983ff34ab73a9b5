"""Attention by cuDNN's fused kernels, without a mask in memory.

JAX's public function for them wants values as wide as keys and turns a mask into a bias of all scores; the private one
beneath it takes widths as in MLA, causality and lengths. Tokens that exist are brought to the front, in their order,
so that lengths say all.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SHORTEST = 128
"""Sequences that are worth a fused kernel."""
WIDEST = 256


def takes(q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], v: Float[Array, "B S N Hv"]) -> bool:
    """Whether cuDNN has kernels for such arrays, and they are long enough to gain by them."""
    narrow = q.dtype in (jnp.bfloat16, jnp.float16)
    widths = [x.shape[-1] for x in (q, v)]
    return (
        narrow and min(q.shape[1], k.shape[1]) >= SHORTEST and max(widths) <= WIDEST and not any(w % 8 for w in widths)
    )


def fused_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N Hv"],
    *,
    scale: float,
    causal: bool,
    valid: Bool[Array, "B S"] | None,
) -> Float[Array, "B T N Hv"]:
    """`attention.dot_product_attention`, but for causal queries at places that are not valid: they get 0.

    Args:
      q: Queries.
      k: Keys.
      v: Values.
      scale: Factor on the scores.
      causal: Query t sees keys 0..t.
      valid: Keys that may be seen.

    Returns:
      Array of q's dtype.
    """
    if q.shape[1] % 2 or k.shape[1] % 2:
        return _even(q, k, v, scale, causal, valid)
    if valid is None:
        return _cudnn(q, k, v, scale, causal, None)
    order = jnp.argsort(~valid, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    lengths = jnp.sum(valid, axis=1, dtype=jnp.int32)
    front = jnp.arange(valid.shape[1])[None] < lengths[:, None]
    lengths = jnp.maximum(lengths, 1)  # a softmax over nothing is not defined
    # What lies behind the lengths is nobody's: it is not to come back as a gradient, whatever a kernel leaves there.
    k, v = (_exist(_move(x, order, back), front) for x in (k, v))
    if not causal:
        return _cudnn(q, k, v, scale, causal, (jnp.full_like(lengths, q.shape[1]), lengths))
    q = _exist(_move(q, order, back), front)
    return _exist(_move(_cudnn(q, k, v, scale, causal, (lengths, lengths)), back, order), valid)


def _even(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N Hv"],
    scale: float,
    causal: bool,
    valid: Bool[Array, "B S"] | None,
) -> Float[Array, "B T N Hv"]:
    """`fused_attention` of odd lengths, which JAX refuses where there is a backward pass: with one place more."""
    length, odd = q.shape[1], k.shape[1] % 2
    if odd and not causal and valid is None:  # causality hides the place from all queries that were there before
        valid = jnp.ones(k.shape[:2], bool)
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    valid = None if valid is None else jnp.pad(valid, ((0, 0), (0, odd)))
    return fused_attention(q, k, v, scale=scale, causal=causal, valid=valid)[:, :length]


def _cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N Hv"],
    scale: float,
    causal: bool,
    lengths: tuple[Int[Array, " B"], Int[Array, " B"]] | None,
) -> Float[Array, "B T N Hv"]:
    """The private call; `lengths` are those of queries and of keys."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    if lengths is None:
        return dot_product_attention(q, k, v, scale=scale, mask_type=MaskType.CAUSAL if causal else MaskType.NO_MASK)
    kind = MaskType.PADDING_CAUSAL if causal else MaskType.PADDING
    return dot_product_attention(q, k, v, q_seqlen=lengths[0], kv_seqlen=lengths[1], scale=scale, mask_type=kind)


def _exist(x: Float[Array, "B S N H"], there: Bool[Array, "B S"]) -> Float[Array, "B S N H"]:
    return jnp.where(there[:, :, None, None], x, 0)


@jax.custom_vjp
def _move(x: Float[Array, "B S N H"], order: Int[Array, "B S"], back: Int[Array, "B S"]) -> Float[Array, "B S N H"]:
    """Brings x in a new order; `back` undoes it, and so the backward pass too is a gather."""
    return jnp.take_along_axis(x, order[:, :, None, None], axis=1)


def _move_forward(x: Array, order: Array, back: Array) -> tuple[Array, tuple[Array, Array]]:
    return _move(x, order, back), (order, back)


def _move_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    return _move(gradient, saved[1], saved[0]), None, None


_move.defvjp(_move_forward, _move_backward)
