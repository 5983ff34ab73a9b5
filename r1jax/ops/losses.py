"""Losses with weights for missing targets; label smoothing as in Szegedy et al. 2016, section 7."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "*B V"], labels: Int[Array, "*B"], *, smoothing: float | Float[Array, "*B"] = 0.0
) -> Float[Array, "*B"]:
    """Cross-entropy against (1 - smoothing) one_hot(label) + smoothing / V, in nats and fp32."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    hit = jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
    return -(1 - smoothing) * hit - smoothing * jnp.mean(log_probs, axis=-1)


def binary_cross_entropy(
    logits: Float[Array, "*B"], labels: Float[Array, "*B"], *, smoothing: float = 0.0
) -> Float[Array, "*B"]:
    """Two-class cross-entropy against (1 - smoothing) label + smoothing / 2, in nats and fp32."""
    logits = logits.astype(jnp.float32)
    target = (1 - smoothing) * labels + smoothing / 2
    return jax.nn.softplus(logits) - target * logits


def huber(error: Float[Array, "*B"], delta: float = 1.0) -> Float[Array, "*B"]:
    """error^2 / 2 within delta, linear beyond (Huber 1964)."""
    size = jnp.abs(error)
    return jnp.where(size <= delta, 0.5 * error**2, delta * (size - 0.5 * delta))


def weighted_mean(
    values: Float[Array, "*B"], weights: Float[Array, "*B"], total: Float[Array, ""] | None = None
) -> Float[Array, ""]:
    """sum(w v) / max(total, 1): zero where nothing is known.

    Args:
      values: What is averaged.
      weights: Not negative.
      total: Sum of the weights of a whole batch of which these are a part, so that parts add up; None is sum(w).

    Returns:
      Scalar.
    """
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights) if total is None else total, 1.0)
