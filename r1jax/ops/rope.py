"""Rotary position embedding with YaRN, as DeepSeek-V3 uses it."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from r1jax.config import YarnConfig


def inverse_frequencies(dim: int, theta: float, yarn: YarnConfig) -> Float[np.ndarray, " half"]:
    """Angular frequency of each rotary pair, in radians per position.

    YaRN (Peng et al. 2023, section 3.2) divides the slow pairs by `factor`, keeps the fast ones, and ramps between.

    Args:
      dim: Rotary width of a head; even.
      theta: Base of the geometric series of frequencies.
      yarn: Context extension; factor 1 leaves the frequencies as they are.

    Returns:
      float32 [dim / 2].
    """
    frequency = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if yarn.factor == 1.0:
        return frequency.astype(np.float32)

    def pair_of(rotations: float) -> float:
        """Index of the pair that turns so often within the original context."""
        return dim * math.log(yarn.original_max_position_embeddings / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of(yarn.beta_slow)), dim - 1)
    span = high - low if high != low else 0.001
    ramp = np.clip((np.arange(dim // 2) - low) / span, 0, 1)
    return (frequency / yarn.factor * ramp + frequency * (1 - ramp)).astype(np.float32)


def yarn_magnitude(factor: float, mscale: float) -> float:
    """YaRN's growth of attention magnitude, 0.1 mscale ln(factor) + 1 (1 where the context is not extended)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(head_dim: int, yarn: YarnConfig) -> float:
    """Scale of attention scores: head_dim^-0.5 times YaRN's magnitude squared (DeepSeek-V3 `inference/model.py`)."""
    return head_dim**-0.5 * yarn_magnitude(yarn.factor, yarn.mscale_all_dim) ** 2


def apply_rope(
    x: Float[Array, "B T N R"],
    positions: Int[Array, "B T"],
    frequencies: Float[np.ndarray, " half"],
    *,
    interleave: bool,
    magnitude: float = 1.0,
) -> Float[Array, "B T N R"]:
    """Turns each pair of channels by its position; the result is in half layout (all first members, then all second).

    Args:
      x: Queries or keys.
      positions: Position of each token.
      frequencies: From `inverse_frequencies`.
      interleave: Pairs are (0, 1), (2, 3), ... on input; otherwise (0, R/2), (1, R/2 + 1), ...
      magnitude: Factor on cosine and sine, m(mscale) / m(mscale_all_dim): 1 for DeepSeek-V3.

    Returns:
      Array of x's shape and dtype. Scores do not depend on the layout as long as queries and keys share it.
    """
    cos, sin = (part[:, :, None] for part in rotary_factors(positions, frequencies, magnitude))
    wide = x.astype(jnp.float32)
    first, second = (wide[..., 0::2], wide[..., 1::2]) if interleave else jnp.split(wide, 2, axis=-1)
    return jnp.concatenate(turn_halves(first, second, cos, sin), axis=-1).astype(x.dtype)


def rotary_factors(
    positions: Int[Array, "*T"], frequencies: Float[np.ndarray, " half"], magnitude: float
) -> tuple[Float[Array, "*T half"], Float[Array, "*T half"]]:
    """Cosine and sine of the angle of each pair, times a magnitude."""
    angle = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies).reshape(*[1] * positions.ndim, -1)
    return magnitude * jnp.cos(angle), magnitude * jnp.sin(angle)


def turn_halves(first: Array, second: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """Pairs of numbers, first members and second ones apart, turned by their angles."""
    return first * cos - second * sin, second * cos + first * sin
