"""Scaling of numbers by what the training part holds."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from r1jax.data.plugins import Case, Preprocessor
from r1jax.data.schema import Schema
from r1jax.errors import UserError


@dataclass
class Scale(Preprocessor):
    """Shifts and scales each column to mean 0 and standard deviation 1 over the training cases; NaN stays NaN.

    The statistics are in every checkpoint, and other parts of the data use those. The medical task scales its own
    record by fixed units: this is for other tables and series.

    Attributes:
      field: Name of the floats [..., columns].
    """

    field: str = "table"
    fitted: ClassVar[bool] = True

    def output(self, schema: Schema) -> Schema:
        """The same fields.

        Raises:
          UserError: The field holds no floats.
        """
        before = schema.select([self.field]).fields[0]
        if not before.shape or np.dtype(before.dtype or "S").kind != "f":
            raise UserError(f"{self.field!r} is {before.dtype or before.kind} {list(before.shape)}, not rows of floats")
        return schema

    def fit(self, cases: Iterable[Case]) -> dict[str, Any]:
        """Mean and standard deviation of what is known of each column (Welford's method, by Chan et al. 1983)."""
        count, mean, squares = np.float64(0), np.float64(0), np.float64(0)
        for case in cases:
            rows = case[self.field].reshape(-1, case[self.field].shape[-1]).astype(np.float64)
            known = ~np.isnan(rows)
            more = known.sum(axis=0)
            own = np.where(known, rows, 0).sum(axis=0) / np.maximum(more, 1)
            spread = (np.where(known, rows - own, 0) ** 2).sum(axis=0)
            total = count + more
            shift = own - mean
            squares = squares + spread + shift**2 * count * more / np.maximum(total, 1)
            mean = mean + shift * more / np.maximum(total, 1)
            count = total
        deviation = np.sqrt(squares / np.maximum(count, 1))
        return {
            "mean": np.where(count > 0, mean, 0).tolist(),
            "deviation": np.where(deviation > 0, deviation, 1).tolist(),  # a constant column becomes 0
            "known": count.astype(int).tolist(),
        }

    def process(self, case: Case) -> Case:
        """Scales the numbers of a case."""
        known, values = self.statistics, case[self.field]
        scaled = (values - np.array(known["mean"])) / np.array(known["deviation"])
        return {**case, self.field: scaled.astype(values.dtype)}
