"""Losses with weights for missing targets; label smoothing as in Szegedy et al. 2016, section 7."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LEAST = 0.02
"""Of a class that is scored below all margins: it is not impossible."""


def cross_entropy(
    logits: Float[Array, "*B V"], labels: Int[Array, "*B"], *, smoothing: float | Float[Array, "*B"] = 0.0
) -> Float[Array, "*B"]:
    """Cross-entropy against (1 - smoothing) one_hot(label) + smoothing / V, in nats and fp32."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    hit = jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
    return -(1 - smoothing) * hit - smoothing * jnp.mean(log_probs, axis=-1)


def squared_hinge(scores: Float[Array, "*B V"], labels: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """Squared hinge loss of each class against the others, summed, in fp32.

    It is that of LIBLINEAR's support vector machines (Fan et al. 2008); `hinge_probabilities` says what scores mean.
    """
    scores = scores.astype(jnp.float32)
    side = 2 * jax.nn.one_hot(labels, scores.shape[-1], dtype=jnp.float32) - 1
    return jnp.sum(jnp.square(jax.nn.relu(1 - side * scores)), axis=-1)


def hinge_probabilities(scores: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Probability of each class from scores that `squared_hinge` trained.

    The loss is least at the score 2 p - 1 (Zhang 2004, section 3), so that a class has (1 + score) / 2, but at least
    `LEAST`, over the sum of all classes.
    """
    told = jnp.clip((1 + scores.astype(jnp.float32)) / 2, LEAST, 1.0)
    return told / jnp.sum(told, axis=-1, keepdims=True)


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
