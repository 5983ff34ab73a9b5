"""Arrays that are read when somebody asks for their numbers, so that a tree of them takes no memory."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from r1jax.models.lora import merge_lora, merge_weight
from r1jax.train.checkpoint import Checkpoint


@dataclass(frozen=True)
class LazyArray:
    """A shape, a dtype, and a way to the numbers, which `np.asarray` goes each time anew."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return math.prod(self.shape)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """The numbers, in memory of their own."""
        del copy
        return self.read().astype(dtype or self.dtype, copy=False)


def lazy_decoder(checkpoint: Checkpoint) -> dict[str, Any]:
    """Verifies a checkpoint and finds its decoder: the averaged weights where there are some, adapters merged.

    Args:
      checkpoint: Of training, or of `r1jax hf import`.

    Returns:
      Parameters of the decoder as a tree of `LazyArray`, in their stored dtypes; nothing is read yet.

    Raises:
      UserError: The checkpoint is damaged, holds no decoder, or has codes that adapters cannot be added to.
    """
    checkpoint.refuse_codes()
    group, described = checkpoint.find_decoder()
    decoder = _lazy(checkpoint, (group, "decoder"), described)
    return merge_lora(decoder, checkpoint.config().model, _merge_later)


def _lazy(checkpoint: Checkpoint, keys: tuple[str, ...], described: Any) -> Any:
    """A part of a checkpoint's state, which nested dicts of shapes and dtypes describe."""
    if isinstance(described, dict):
        return {key: _lazy(checkpoint, (*keys, key), part) for key, part in described.items()}
    shape, dtype = tuple(described.shape), np.dtype(described.dtype)

    def read() -> np.ndarray:
        wanted: Any = jax.ShapeDtypeStruct(shape, dtype)
        for key in reversed(keys):
            wanted = {key: wanted}
        (value,) = jax.tree.leaves(checkpoint.read(wanted))
        return value

    return LazyArray(shape, dtype, read)


def _merge_later(weight: LazyArray, a: LazyArray, b: LazyArray, scale: float) -> LazyArray:
    """`merge_weight`, done when somebody asks for the sum."""
    return LazyArray(
        weight.shape, weight.dtype, lambda: np.asarray(merge_weight(*map(np.asarray, (weight, a, b)), scale))
    )
