"""The interface of everything that gives cases by index."""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from r1jax.data.schema import Schema


@runtime_checkable
class Source(Protocol):
    """Raw cases by index, always the same case for the same index, safe to read from several threads.

    Attributes:
      name: What the cases are, for people; printed and stored with every result.
      fingerprint: sha256 (hex) over what defines the cases.
      schema: What `read_batch` gives; `schema.modalities` is what a model can read of it.
    """

    name: str
    fingerprint: str
    schema: Schema

    def __len__(self) -> int:
        """Number of cases."""
        ...

    def read_batch(self, indices: Int[np.ndarray, " B"]) -> dict[str, np.ndarray | list[str]]:
        """Reads raw cases.

        Args:
          indices: Which cases, 0 <= index < len(self), in any order.

        Returns:
          "case_id": B strings; "volume": int16 HU or uint8 (HU -1000..400 as 0..255) [B, Z, Y, X] and
          "volume_spacing": float32 [B, 3], mm a voxel; "image" and "image_spacing": the same with [B, Y, X] and [B, 2];
          "table": float32 [B, fields] in the order of `RECORD_FIELDS`, NaN where missing; "text": B strings, "" where
          missing; "target.<finding>": float32 [B], or [B, 3] for "center_mm", for every finding, NaN where unknown.
          "mask" (bool, like the picture), "has_volume" and "has_image" (bool [B]) are optional.
        """
        ...
