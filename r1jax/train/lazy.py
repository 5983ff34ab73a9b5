"""Arrays that are read when somebody asks for their numbers, so that a tree of them takes no memory."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.typing import DTypeLike

from r1jax.models.lora import merge_weight


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


def stored_arrays(state: Path, keys: tuple[str, ...], metadata: Any) -> Any:
    """Describes a part of a state that Orbax has written.

    Args:
      state: Folder of the state.
      keys: Where the part is within it.
      metadata: Orbax's description of the part: nested dicts of shapes and dtypes.

    Returns:
      The part, as a tree of `LazyArray`.
    """
    if isinstance(metadata, dict):
        return {key: stored_arrays(state, (*keys, key), part) for key, part in metadata.items()}
    shape, dtype = tuple(metadata.shape), np.dtype(metadata.dtype)

    def nested(value: Any) -> Any:
        for key in reversed(keys):
            value = {key: value}
        return value

    def read() -> np.ndarray:
        asked, how = nested(jax.ShapeDtypeStruct(shape, dtype)), nested(ocp.RestoreArgs(restore_type=np.ndarray))
        with ocp.PyTreeCheckpointer() as checkpointer:
            arguments = ocp.args.PyTreeRestore(item=asked, restore_args=how, partial_restore=True)
            (value,) = jax.tree.leaves(checkpointer.restore(state, args=arguments))
        return value

    return LazyArray(shape, dtype, read)


def merge_later(weight: LazyArray, a: LazyArray, b: LazyArray, scale: float) -> LazyArray:
    """`r1jax.models.lora.merge_weight`, done when somebody asks for the sum."""
    return LazyArray(
        weight.shape, weight.dtype, lambda: np.asarray(merge_weight(*map(np.asarray, (weight, a, b)), scale))
    )
