"""Linear layer and cross-entropy in one, in chunks of tokens: the logits of a large vocabulary are never held whole.

A chunk's gradient is formed while its logits are there (Wijmans et al. 2025, "Cut your losses in large-vocabulary
language models", without their sparsity): the backward pass only scales it. Chunks run along the time axis, so that a
batch that is spread over devices stays spread.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from r1jax.ops.losses import cross_entropy
from r1jax.ops.self_test import target

CHUNK, CHUNK_ON_GPU = 1024, 3072
"""Tokens whose logits are held at once, at most; with more, the weight's gradient is read and written less often."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def linear_cross_entropy(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> Float[Array, ""]:
    """Weighted sum over tokens of the cross-entropy of softmax(hidden weight^T), in nats and fp32.

    Args:
      hidden: States, fp32 or bf16; products are formed in this type and summed in fp32.
      weight: Language head, [out, in].
      labels: Tokens to predict; where the weight is 0, any valid index.
      weights: Of each token, not negative; no gradient flows to them. About 1 at most in fp16, whose gradients are
        formed with these weights: a mean is a sum that is divided afterwards.
      smoothing: Label smoothing, as in `cross_entropy`.
      z_loss: Factor of the squared log normaliser (Chowdhery et al. 2022, section 5).
      chunk: Tokens whose logits are held at once, at most, in whole time steps of the batch; None leaves it to the
        device.

    Returns:
      Scalar.
    """
    return jnp.sum(token_losses(hidden, weight, labels, smoothing, z_loss, chunk) * weights)


def token_losses(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, "B T"],
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> Float[Array, "B T"]:
    """The losses that `linear_cross_entropy` sums; meant for scoring, its gradient would hold every logit."""
    weight = weight.astype(hidden.dtype)

    def one(_: None, part: tuple[Array, Array]) -> tuple[None, Array]:
        return None, _losses(_logits(part[0], weight), part[1], smoothing, z_loss)[0]

    losses = jax.lax.scan(one, None, (_chunks(hidden, chunk), _chunks(labels, chunk)))[1]
    return _whole(losses, hidden.shape[1])


def _forward(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    smoothing: float,
    z_loss: float,
    chunk: int | None,
) -> tuple[Float[Array, ""], tuple[Array, Array]]:
    narrow = weight.astype(hidden.dtype)

    def one(carry: tuple[Array, Array], part: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        total, to_weight = carry
        x, y, w = part
        logits = _logits(x, narrow)
        losses, normaliser = _losses(logits, y, smoothing, z_loss)
        target = (1 - smoothing) * jax.nn.one_hot(y, logits.shape[-1]) + smoothing / logits.shape[-1]
        slope = jnp.exp(logits - normaliser[..., None]) * (1 + 2 * z_loss * normaliser)[..., None] - target
        slope = (slope * w[..., None]).astype(x.dtype)
        to_hidden = jnp.einsum("btV,VD->btD", slope, narrow, preferred_element_type=jnp.float32)
        to_weight = to_weight + jnp.einsum("btV,btD->VD", slope, x, preferred_element_type=jnp.float32)
        total = total + jnp.sum(losses * w)
        return (total, to_weight), to_hidden.astype(x.dtype)

    parts = tuple(_chunks(x, chunk) for x in (hidden, labels, weights))
    start = (jnp.zeros((), jnp.float32), jnp.zeros(weight.shape, jnp.float32))
    (total, to_weight), to_hidden = jax.lax.scan(one, start, parts)
    return total, (_whole(to_hidden, hidden.shape[1]), to_weight.astype(weight.dtype))


def _backward(
    smoothing: float, z_loss: float, chunk: int | None, saved: tuple[Array, Array], scale: Float[Array, ""]
) -> tuple[Array, Array, None, None]:
    del smoothing, z_loss, chunk
    return (*((x.astype(jnp.float32) * scale).astype(x.dtype) for x in saved), None, None)


linear_cross_entropy.defvjp(_forward, _backward)


def linear_cross_entropy_reference(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Array, ""]:
    """`linear_cross_entropy` with all logits at once."""
    logits = _logits(hidden, weight.astype(hidden.dtype))
    losses = cross_entropy(logits, labels, smoothing=smoothing) + z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.sum(losses * weights)


def _logits(x: Float[Array, "B t D"], weight: Float[Array, "V D"]) -> Float[Array, "B t V"]:
    return jnp.einsum("btD,VD->btV", x, weight, preferred_element_type=jnp.float32)


def _losses(
    logits: Float[Array, "B t V"], labels: Int[Array, "B t"], smoothing: float, z_loss: float
) -> tuple[Float[Array, "B t"], Float[Array, "B t"]]:
    """Losses of tokens and their log normalisers; log-probabilities are not written."""
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    losses = normaliser - (1 - smoothing) * jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    if smoothing:
        losses = losses - smoothing * jnp.mean(logits, axis=-1)
    return losses + z_loss * normaliser**2, normaliser


def _chunks(x: Array, chunk: int | None) -> Array:
    """[B, T, ...] as [chunks, B, t, ...] of as equal a length as can be.

    Zeros fill the last chunk, fewer than there are chunks; zero is the weight of what they add.
    """
    batch, length, *rest = x.shape
    chunk = chunk or (CHUNK_ON_GPU if target().platform == "gpu" else CHUNK)
    count = -(-length // max(1, chunk // batch))
    step = -(-length // count)
    x = jnp.pad(x, [(0, 0), (0, count * step - length), *[(0, 0)] * len(rest)])
    return jnp.moveaxis(x.reshape(batch, count, step, *rest), 1, 0)


def _whole(x: Array, length: int) -> Array:
    """Undoes `_chunks`."""
    count, batch, step, *rest = x.shape
    return jnp.moveaxis(x, 0, 1).reshape(batch, count * step, *rest)[:, :length]
