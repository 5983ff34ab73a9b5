"""Dynamic loss scaling for fp16, whose smallest number is 6e-8 (Micikevicius et al. 2018, section 3.2)."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

FIRST_SCALE = 2.0**15
GROWTH_INTERVAL = 2000
"""Steps without an overflow after which the scale doubles."""
LARGEST_SCALE = 2.0**24


class LossScale(NamedTuple):
    """What the scale depends on."""

    scale: Float[Array, ""]
    """Factor on the loss; a power of two, so that it rounds nothing."""
    good: Int[Array, ""]
    """Steps since it last changed."""
    skipped: Int[Array, ""]
    """Steps of the run that overflowed and changed nothing."""


class ScaledState(NamedTuple):
    """State of an optimizer whose gradients come from a scaled loss."""

    optimizer: Any
    scaling: LossScale


def first_scale() -> LossScale:
    """The scale of a fresh run."""
    return LossScale(jnp.float32(FIRST_SCALE), jnp.int32(0), jnp.int32(0))


def next_scale(old: LossScale, finite: Bool[Array, ""]) -> LossScale:
    """Halves the scale after an overflow, and doubles it after many steps without one.

    Args:
      old: Of the step that was done.
      finite: Whether all its gradients were finite.

    Returns:
      Of the next step; at least 1.
    """
    grows = finite & (old.good + 1 >= GROWTH_INTERVAL)
    factor = jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5)
    return LossScale(
        scale=jnp.clip(old.scale * factor, 1.0, LARGEST_SCALE),
        good=jnp.where(finite & ~grows, old.good + 1, 0),
        skipped=old.skipped + jnp.where(finite, 0, 1),
    )
