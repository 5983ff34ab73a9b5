"""The interface of a cold store: rows that lie in blocks, each of which is read as a whole."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from r1jax.data.schema import Schema


@runtime_checkable
class BlockStore(Protocol):
    """Rows in blocks (row groups of Parquet), always the same; picklable, and safe to read from several threads.

    Attributes:
      schema: What each row holds.
      fingerprint: Hash (hex) over what defines the rows; files that are written again have another.
      starts: First row of each block, and the number of rows at the end; G blocks.
    """

    schema: Schema
    fingerprint: str
    starts: Int64[np.ndarray, " G+1"]

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def read_blocks(self, blocks: Sequence[int]) -> list[pa.RecordBatch]:
        """Reads whole blocks.

        Args:
          blocks: Which, each once.

        Returns:
          One batch a block, in the order asked for, with the columns of `schema`.
        """
        ...
