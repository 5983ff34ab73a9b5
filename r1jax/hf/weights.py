"""Tensors on disk as numbers, a few megabytes at a time; block fp8 is dequantised on the way."""

import math
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from r1jax.hf.config import FP8_BLOCK
from r1jax.hf.files import DTYPES, FP8, Stored
from r1jax.hf.match import SCALE

READ_BYTES = 2**24
"""Bytes of numbers that are read at a time."""
FP8_VALUES = np.arange(256, dtype=np.uint8).view(DTYPES[FP8]).astype(np.float32)


class Weight:
    """A vector or matrix of a checkpoint."""

    def __init__(self, tensors: dict[str, Stored], name: str) -> None:
        """Finds the tensor and, where it is fp8, its scale; reads nothing.

        Args:
          tensors: All tensors of the folder by name.
          name: One of them.
        """
        self._tensor, self._scale = tensors[name], tensors.get(name + SCALE)

    @cached_property
    def _factors(self) -> np.ndarray | None:
        """fp32 factors of the blocks of fp8."""
        return None if self._scale is None else self._scale.read_rows(0, self._scale.shape[0])

    def blocks(self) -> Iterator[slice]:
        """Ranges of rows that together are the tensor, READ_BYTES in memory or one row each."""
        rows, width = self._tensor.shape[0], math.prod(self._tensor.shape[1:])
        size = 4 if self._scale is not None else DTYPES[self._tensor.dtype].itemsize
        step = max(READ_BYTES // max(width * size, 1), 1)
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))

    def read(self, rows: slice) -> np.ndarray:
        """Reads rows.

        Args:
          rows: Start and stop within the first axis.

        Returns:
          Array in memory of its own, in the dtype that is stored; block fp8 is fp32, exactly what it stands for.

        Raises:
          UserError: The file cannot be read or ended early.
        """
        values = self._tensor.read_rows(rows.start, rows.stop)
        if self._factors is None:
            return values
        row, column = np.arange(rows.start, rows.stop) // FP8_BLOCK, np.arange(values.shape[1]) // FP8_BLOCK
        return FP8_VALUES[values.view(np.uint8)] * self._factors[row][:, column]
