"""Gradient accumulation inside the compiled step: a batch in parts, one after another, with the sums of the whole."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from r1jax.ops import pipeline
from r1jax.train.ranges import is_range

T = TypeVar("T")


def divide(batch: Any, count: int) -> Any:
    """Divides a batch into microbatches: every count-th case belongs to the same one.

    Neighbours are spread over the microbatches, so that on a mesh each device keeps the cases that it has.

    Args:
      batch: Arrays [B, ...]; B is a multiple of `count`.
      count: Microbatches.

    Returns:
      Arrays [count, B / count, ...].
    """
    return jax.tree.map(lambda x: pipeline.divide(x, count), batch)


def sum_over(function: Callable[[Any], T], parts: Any) -> T:
    """Sums a function over microbatches in a loop of the compiled program, in fp32 where a number is narrower.

    Args:
      function: Takes a microbatch; returns a tree of sums. What it has for a range is the largest, and no sum.
      parts: From `divide`.

    Returns:
      The tree of totals; with a single microbatch just what the function returns.
    """
    first = jax.tree.map(lambda x: x[0], parts)
    if len(jax.tree.leaves(parts)[0]) == 1:
        return function(first)

    def add(total: T, part: Any) -> tuple[T, None]:
        return jax.tree_util.tree_map_with_path(join, total, function(part)), None

    def join(path: tuple[Any, ...], a: Array, b: Array) -> Array:
        return jnp.maximum(a, b) if is_range(path) else a + b.astype(a.dtype)

    def zero(x: jax.ShapeDtypeStruct) -> Array:
        return jnp.zeros(x.shape, jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)

    return jax.lax.scan(add, jax.tree.map(zero, jax.eval_shape(function, first)), parts)[0]
