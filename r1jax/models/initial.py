"""Initial weights: normally distributed, and the same on every mesh."""

import math
from collections.abc import Callable
from functools import partial

import jax
from jax.typing import DTypeLike
from jaxtyping import Array

LARGE = 2**22
"""Arrays of so many numbers are drawn in parts where they are kept in parts."""


def normal(std: float) -> Callable[..., Array]:
    """Draws weights with a standard deviation.

    The generator of the run's key (`rbg`) is one instruction, fast to compile, but each device executes it for the
    whole array and keeps its part. Large arrays come from threefry, of which each device computes its part alone.

    Args:
      std: Standard deviation.

    Returns:
      (key, shape, dtype) -> weights.
    """
    return partial(_draw, std)


def _draw(std: float, key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    if math.prod(shape) >= LARGE:
        key = jax.random.wrap_key_data(jax.random.key_data(key)[..., :2], impl="threefry2x32")
    return jax.random.normal(key, shape, dtype) * std
