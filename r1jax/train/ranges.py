"""Running ranges of the inputs of rounded products: numbers of the parameter tree that follow what training sees.

They are no weights: no optimizer, decay or average moves them. A range begins as the largest magnitude of the first
batch that has any, and is then a moving average of those of the batches (Jacob et al. 2018, section 3.1), until
`train.quant_freeze` of the run is done.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from r1jax.config import TrainConfig
from r1jax.models.lora import split_tree
from r1jax.models.quantized import RANGE
from r1jax.ops.quantize import Quantized
from r1jax.train.quantized import path_of

DECAY = 0.99
"""Of the moving average, once it is a hundred steps old; until then (1 + n) / (10 + n), as that of the weights."""


def split_ranges(params: Any) -> tuple[Any, Any]:
    """Trees of the ranges, and of everything else."""
    return split_tree(params, (RANGE,))


def is_range(path: tuple[Any, ...]) -> bool:
    """Whether the path of an array is that of a range."""
    return bool(path) and getattr(path[-1], "key", None) == RANGE


def follow(ranges: Any, seen: Any, share: Float[Array, ""], config: TrainConfig) -> Any:
    """Ranges after a step.

    Args:
      ranges: Tree of fp32 scalars; 0 is none yet.
      seen: Largest magnitude that each has met in the step; 0 where its weight met nothing, or only zeros.
      share: Of the run that was done before the step.
      config: From when to when they move.

    Returns:
      The new ranges.
    """
    count = jnp.maximum(share - config.quant_start, 0.0) * config.steps
    decay = jnp.minimum(DECAY, (1 + count) / (10 + count))

    def moved(old: Array, new: Array) -> Array:
        averaged = jnp.where(old > 0, old * decay + new * (1 - decay), new)
        return jnp.where((new > 0) & (share < config.quant_freeze), averaged, old)

    return jax.tree.map(moved, ranges, seen)


def with_ranges(codes: dict[str, Quantized], ranges: Any) -> dict[str, Quantized]:
    """Codes whose inputs have the range that training has given them.

    Args:
      codes: Of weights, by name.
      ranges: From `split_ranges`; where one is 0, blocks of the inputs have their own.

    Returns:
      Codes as they are served.
    """
    held = {
        f"{path_of(path[:-1])}/weight": jnp.full((1, 1), x, jnp.float32)
        for path, x in jax.tree_util.tree_leaves_with_path(ranges)
        if x > 0
    }
    return {name: q._replace(span=held.get(name)) for name, q in codes.items()}
